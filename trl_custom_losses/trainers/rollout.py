"""A generation batch of TRL's GRPO trainer as losses see it in `prepare`."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ..types import ModelOutputs, Ranks, Rollout
from .announce import logger
from .columns import COLUMN_PREFIX, column_values
from .forward import PolicyForward

# What TRL's per-token forward takes besides ids, mask and lengths: image tensors and the like.
FORWARD_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters.items()
    if parameter.default is None and name != "batch_size"
)

#: Names under which a generation batch carries what losses see to the micro-batches.
REWARDS, GROUPS, PREPARED_PREFIX = "loss_rewards", "loss_group_ids", "loss_prepared:"


class _PoolingForward(PolicyForward):
    """Pools the hidden states of each chunk of rows that the model is called with.

    Args:
        mask: 1 on the positions to pool, (B, T), the last T of the sequence.
        **options: As for `PolicyForward`.
    """

    def __init__(self, mask: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.mask = mask
        self.chunks: list[Tensor] = []
        self.done = 0

    def __call__(self, **kwargs: Any) -> Any:
        outputs = super().__call__(**kwargs)
        if self.hidden is not None:
            rows = self.hidden.size(0)
            self.chunks.append(self.pooled(self.mask[self.done : self.done + rows]))
            self.done += rows
            self.hidden = None
        return outputs


class RolloutModel:
    """Runs the policy on a generation batch, without gradient and in chunks of a micro-batch's size.

    Args:
        trainer: A `CustomGRPOTrainer`.
        output: What TRL's generation returned.
        mask: This rank's scored tokens, (B, T).
    """

    def __init__(self, trainer: Any, output: dict[str, Any], mask: Tensor) -> None:
        self.trainer = trainer
        self.output = output
        self.mask = mask

    @functools.cached_property
    def outputs(self) -> ModelOutputs:
        """The policy's outputs on the completions."""
        hidden = "pooled_hidden" in self.trainer.loss_function.rollout_requires
        logps, pooled = self.output.get("old_per_token_logps"), None
        if logps is None or hidden:
            found, pooled = self._forward(
                self.output["completion_ids"], self.output["completion_mask"], self.mask, hidden=hidden
            )
            logps = found if logps is None else logps
        return ModelOutputs(
            per_token_logps=logps,
            mask=self.mask,
            ref_per_token_logps=self.output.get("ref_per_token_logps"),
            pooled_hidden=pooled,
        )

    def encode(self, texts: list[str]) -> Tensor:
        """Mean last hidden state of texts that answer this rank's prompts, (B, H), float32."""
        if any(self.output.get(name) is not None for name in FORWARD_OPTIONS):
            raise ValueError("texts in answer to prompts with images cannot be encoded; leave out the loss that asks")
        processing = self.trainer.processing_class
        tokenizer = getattr(processing, "tokenizer", processing)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        longest = max(max(map(len, ids)), 1)
        like = self.output["completion_ids"]
        padded = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        padded, mask = padded.to(like.device, like.dtype), mask.to(like.device)
        return self._forward(padded, mask, mask, hidden=True)[1]

    @torch.no_grad()
    def _forward(
        self, completion_ids: Tensor, completion_mask: Tensor, pooled_mask: Tensor, *, hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        trainer, output = self.trainer, self.output
        forward = _PoolingForward(
            pooled_mask,
            model=trainer.model,
            backbone=trainer._backbone() if hidden else None,
            requires=("pooled_hidden",) if hidden else (),
        )
        training = trainer.model.training
        size = trainer.args.per_device_train_batch_size if training else trainer.args.per_device_eval_batch_size
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            forward,
            torch.cat((output["prompt_ids"], completion_ids), dim=1),
            torch.cat((output["prompt_mask"], completion_mask), dim=1),
            completion_ids.size(1),
            batch_size=size,
            **{name: output.get(name) for name in FORWARD_OPTIONS},
        )
        return logps, torch.cat(forward.chunks) if hidden else None


def make_rollout(
    trainer: Any, output: dict[str, Any], rewards: Tensor, groups: Tensor, local: slice, columns: dict[str, Any]
) -> Rollout:
    """The generation batch for `prepare`.

    Args:
        trainer: A `CustomGRPOTrainer`.
        output: What TRL's generation returned, this rank's B rows.
        rewards: Of all ranks, (N, F).
        groups: Prompt index of each, (N,).
        local: This rank's rows of those.
        columns: Declared columns of this rank.
    """
    mask = output["completion_mask"] * output.get("tool_mask", 1)
    model = RolloutModel(trainer, output, mask)
    ranks: Ranks = trainer._ranks
    return Rollout(
        rewards=rewards,
        reward_weights=trainer.reward_weights.to(rewards.device),
        advantages=ranks.gather(output["advantages"]),
        group_ids=groups,
        completion_ids=output["completion_ids"],
        mask=mask,
        columns=columns,
        local=local,
        ranks=ranks,
        # Padding is a special token. The mask would also leave out truncated completions, where those are masked.
        texts=lambda: trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True),
        forward=lambda: model.outputs,
        encode=model.encode,
    )


def extend_rollout(trainer: Any, inputs: list[dict[str, Any]], output: dict[str, Any], rewards: Tensor) -> None:
    """Add rewards, prompt groups, columns and what the loss prepares, while prompt groups are still whole.

    Args:
        trainer: A `CustomGRPOTrainer` with a loss.
        inputs: This rank's rows of the data set.
        output: What TRL's generation returned, this rank's B rows; extended in place.
        rewards: Raw rewards of all ranks, (N, F).
    """
    size, index = output["completion_ids"].size(0), trainer.accelerator.process_index
    local = slice(index * size, (index + 1) * size)
    generations = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    groups = torch.arange(rewards.size(0), device=rewards.device) // generations
    columns = {name: column_values(inputs, name) for name in trainer._columns}
    columns = {name: v.to(rewards.device) if isinstance(v, Tensor) else v for name, v in columns.items()}
    output[REWARDS], output[GROUPS] = rewards[local], groups[local]
    output |= {COLUMN_PREFIX + name: value for name, value in columns.items()}
    loss = trainer._loss_in_mode()
    if not loss.prepares:
        return
    with torch.no_grad():
        prepared = loss.prepare(make_rollout(trainer, output, rewards, groups, local, columns))
    for name, value in prepared.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != size:
            raise ValueError(
                f"`prepare` of the loss '{loss.name}' must return tensors with {size} rows, this rank's sequences; "
                f"'{name}' is {tuple(value.shape) if isinstance(value, Tensor) else type(value)}"
            )
        if name == "advantages":
            _replace_advantages(trainer, output, value.detach())
        else:
            output[PREPARED_PREFIX + name] = value


def _replace_advantages(trainer: Any, output: dict[str, Any], advantages: Tensor) -> None:
    """Use the loss's advantages, in the completions table too (the mean over tokens, if they are per token)."""
    output["advantages"] = advantages
    shown = trainer.accelerator.gather(advantages if advantages.dim() == 1 else advantages.mean(1)).tolist()
    table = trainer._logs["advantages"]
    for _ in range(min(len(shown), len(table))):
        table.pop()
    table.extend(shown)


def keep_in_step(trainer: Any, steps_in_epoch: int, epochs_trained: int, steps_trained: int) -> None:
    """Have a resumed training draw the prompts, and generate at the boundaries, of one that was never stopped.

    TRL's sampler draws each epoch's order from where the last one left its generator, and starts from the seed when
    resumed: the second epoch would repeat the order of the first. TRL counts micro-batches from 0 again, too, so that
    from inside a generation batch it would go on with completions of other prompts.

    Args:
        trainer: A `CustomGRPOTrainer` about to run the first epoch after it was resumed.
        steps_in_epoch: Micro-batches of an epoch.
        epochs_trained: Whole epochs before this one.
        steps_trained: Micro-batches of this epoch that are skipped.
    """
    sampler = trainer._train_sampler
    if getattr(sampler, "shuffle", False):
        for _ in range(epochs_trained):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
    trainer._step = epochs_trained * steps_in_epoch + steps_trained
    period = trainer.args.steps_per_generation * trainer.num_iterations
    if trainer._step % period:
        logger.warning(
            "The checkpoint of step %d was saved in the middle of a generation batch, whose completions are generated "
            "anew. To resume as if nothing had happened, save between generation batches, which are %d micro-batches "
            "of a process each",
            trainer.state.global_step,
            period,
        )
