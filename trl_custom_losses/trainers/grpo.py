"""`trl.GRPOTrainer` with the objective from the registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.extras.profiling import profiling_decorator

from ..balancing.gramian import watch_whole
from ..losses.policy.importance import log_importance_weights
from ..reductions import evaluate, reduce_loss, reduce_values
from ..summaries import summarise
from ..types import Denominators, ModelOutputs, PolicyBatch
from .base import LossFunctionTrainer
from .config import CustomGRPOConfig
from .forward import PolicyForward, keep_differentiable
from .reference_adapter import check_saving, reference_adapter
from .rollout import FORWARD_OPTIONS, GROUPS, PREPARED_PREFIX, REWARDS, extend_rollout, keep_in_step

_TRL_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


class CustomGRPOTrainer(LossFunctionTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` whose objective is a loss from the registry.

    Takes TRL's arguments and `loss_function`; so does `CustomGRPOConfig`. Without one it is TRL's trainer, unchanged.
    TRL's options around the surrogate (KL term, masks, vLLM ratios, entropy bonus, MoE loss) act on every loss.

    Args:
        *args, **kwargs: As for `trl.GRPOTrainer`.
        loss_function: A name, `{"type": name, **hyperparameters}`, a loss object or a function.

    Raises:
        LossConfigError: The loss cannot be built, its columns are missing, or an option of the config cannot be
            honoured with it. Raised before a model is loaded.
    """

    _default_config = CustomGRPOConfig
    _default_suffix = "GRPO"
    _gathered_rewards: Tensor | None = None
    _train_sampler: Any = None

    def __init__(self, *args: Any, loss_function: Any = None, **kwargs: Any) -> None:
        arguments = self._choose_loss(GRPOTrainer, loss_function, args, kwargs)
        config = arguments.get("args")
        requires = set()
        if self.loss_function is not None:
            requires = self.loss_function.requires | self.loss_function.rollout_requires
        # At beta = 0 TRL builds no reference at all, but the loss asks for its log-probabilities.
        self._reference_for_loss = config is not None and config.beta == 0 and "ref_per_token_logps" in requires
        with (
            self._reference_switched_on(config),
            self._loss_shown(config),
            reference_adapter(arguments["model"]),
        ):
            super().__init__(**arguments)
        self.beta, self.loss_type = self.args.beta, self.args.loss_type
        self.importance_sampling_level = self.args.importance_sampling_level
        keep_differentiable(self.model)
        check_saving(self.model, self.args)
        self._set_up_loss()

    @contextmanager
    def _reference_switched_on(self, target: Any) -> Iterator[None]:
        """Let `target.beta` be non-zero while TRL decides whether to build or run the reference."""
        if not self._reference_for_loss:
            yield
            return
        target.beta = 1.0
        try:
            yield
        finally:
            target.beta = 0.0

    @contextmanager
    def _loss_shown(self, config: Any) -> Iterator[None]:
        """Let TRL's constructor see the type that the loss stands for: its checks and warnings depend on it."""
        if self.loss_function is None:
            yield
            return
        stock = config.loss_type, config.importance_sampling_level
        leaves = self.loss_function.leaves()
        shown = next((leaf for leaf in leaves if leaf.name in _TRL_TYPES), None)
        config.loss_type = "grpo" if shown is None else shown.name
        config.importance_sampling_level = getattr(shown, "importance_sampling_level", stock[1])
        try:
            yield
        finally:
            config.loss_type, config.importance_sampling_level = stock

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        if kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]:
            skipped = 0 if self.args.ignore_data_skip else kwargs["steps_trained_in_current_epoch"]
            keep_in_step(self, kwargs["steps_in_epoch"], epoch, skipped)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _abandon_step(self) -> None:
        # Completions of the abandoned step were sampled by older weights and must not be taken for on-policy ones.
        super()._abandon_step()
        self._step, self._buffered_inputs, self._entropy_window_stats = 0, None, None

    # Rollouts

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._gathered_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._gathered_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._reference_switched_on(self):
            output = super()._generate_and_score_completions(inputs)
        if self.loss_function is not None:
            extend_rollout(self, inputs, output, self._gathered_rewards)
        return output

    # Loss

    @profiling_decorator
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The registry's loss on one micro-batch; TRL's own without one."""
        if self.loss_function is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self._registry_loss(model, dict(inputs))

    def _registry_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss_function = self._loss_in_mode()
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        outputs, aux_loss = self._forward(model, inputs)
        batch = self._batch(inputs, outputs, accumulation)

        raw, metrics = evaluate(loss_function, batch, outputs)
        loss = reduce_loss(loss_function, raw, batch)
        watch_whole(loss_function, loss, batch, outputs)
        kl = self._per_token_kl(outputs)
        if kl is not None:
            loss = loss + self.beta * reduce_values(kl, batch, loss_function.kl_reduction)
        watched = {
            "per_token_logps": outputs.per_token_logps,
            "old_per_token_logps": outputs.old_per_token_logps,
            "entropies": outputs.entropies,
            "advantages": batch.advantages,
        }
        if kl is not None:
            watched["ref_per_token_logps"] = outputs.ref_per_token_logps

        collected = summarise(self._named(metrics), batch.mask, loss_function.name)
        if self._entropy_bonus_enabled:
            # TRL reports the normalised types' own mean, the token-mean types' share of the step.
            policy_loss = loss.detach() * (1.0 if loss_function.kl_reduction == "token_mean" else accumulation)
            collected["policy_loss"] = (policy_loss, 1.0, "micro_batch", "mean")
            loss = loss - self._entropy_bonus(outputs, batch, mode) / accumulation
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            collected["aux_loss"] = (aux_loss.detach(), 1.0, "micro_batch", "mean")
            watched["aux_loss"] = aux_loss
        self._end_micro_batch(loss, metrics, watched)
        collected["entropy"] = self._token_average(outputs.entropies, batch.mask)
        if kl is not None:
            collected["kl"] = self._token_average(kl, batch.mask)
        self._buffers[mode].add(collected)
        return loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[ModelOutputs, Tensor | None]:
        """One forward pass through TRL's own per-token path; also the MoE auxiliary loss."""
        completion_mask = inputs["completion_mask"]
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        attention_mask = torch.cat((inputs["prompt_mask"], completion_mask), dim=1)
        forward = PolicyForward(
            model,
            backbone=self._backbone(),
            requires=self.loss_function.requires,
            temperature=self.temperature,
            positions=completion_mask.size(1),
        )
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            forward,
            torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1),
            attention_mask,
            completion_mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in FORWARD_OPTIONS},
        )
        old = inputs.get("old_per_token_logps")
        outputs = ModelOutputs(
            per_token_logps=logps,
            mask=mask,
            entropies=entropies,
            # Generation aligned with the optimizer step: the policy that generated is this one.
            old_per_token_logps=logps.detach() if old is None else old,
            ref_per_token_logps=inputs.get("ref_per_token_logps"),
            logits=forward.logits,
            **forward.hidden_fields(mask, attention_mask),
        )
        return outputs, aux_loss

    def _batch(self, inputs: dict[str, Any], outputs: ModelOutputs, accumulation: float) -> PolicyBatch:
        """What the loss sees, with TRL's masks."""
        on_policy_mask, entropy_mask, ratio = None, None, None
        if self.off_policy_mask_threshold is not None:
            on_policy_mask = self.get_off_policy_mask(
                # TRL keeps every sequence of non-negative advantage; which those are may differ between components,
                # so this asks for the others' answer and `PolicyBatch` combines the two.
                advantages=outputs.mask.new_full((outputs.mask.size(0), 1), -1),
                per_token_logps=outputs.per_token_logps,
                # The sampler's own log-probabilities also reveal the mismatch between vLLM and the training model.
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", outputs.old_per_token_logps),
                mask=outputs.mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(outputs.entropies, outputs.mask, 1 - self.top_entropy_quantile)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"]
        return PolicyBatch(
            prompt_ids=inputs["prompt_ids"],
            completion_ids=inputs["completion_ids"],
            mask=outputs.mask,
            advantages=inputs["advantages"],
            rewards=inputs.get(REWARDS),
            group_ids=inputs.get(GROUPS),
            on_policy_mask=on_policy_mask,
            entropy_mask=entropy_mask,
            importance_sampling_ratio=ratio,
            columns=self._take_columns(inputs),
            prepared={
                name.removeprefix(PREPARED_PREFIX): value
                for name, value in inputs.items()
                if name.startswith(PREPARED_PREFIX)
            },
            ranks=self._ranks,
            denominators=self._denominators(inputs, outputs.mask, accumulation),
        )

    def _denominators(self, inputs: dict[str, Any], mask: Tensor, accumulation: float) -> Denominators:
        """TRL's normalisers: the loss divides by the accumulation itself, and ranks are averaged."""
        if "num_items_in_batch" not in inputs:  # a micro-batch made by hand counts as the whole batch
            tokens = mask.sum().clamp(min=1) * accumulation
        else:  # counted over the generation batch of all ranks; scaled to one optimizer step
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self.model.training:
                tokens = tokens * accumulation / self.args.steps_per_generation
        processes = self.accelerator.num_processes
        return Denominators(
            sequences=mask.size(0) * accumulation,
            tokens=tokens,
            micro_batches=accumulation,
            share=1 / (accumulation * processes),  # TRL's micro-batches are of one size
            step_fraction=1 / processes,
        )

    def _per_token_kl(self, outputs: ModelOutputs) -> Tensor | None:
        """Schulman's k3 estimate of KL(policy || reference), (B, T), nats; None at beta = 0."""
        if self.beta == 0:
            return None
        difference = (outputs.ref_per_token_logps - outputs.per_token_logps).clamp(max=80.0)  # exp(88) overflows
        kl = torch.exp(difference) - difference - 1
        if self.args.use_bias_correction_kl:
            leaves = self.loss_function.leaves()
            levels = [leaf.importance_sampling_level for leaf in leaves if hasattr(leaf, "importance_sampling_level")]
            level = levels[0] if levels else self.importance_sampling_level
            kl = kl * torch.exp(log_importance_weights(outputs, level))
        return kl

    def _entropy_bonus(self, outputs: ModelOutputs, batch: PolicyBatch, mode: str) -> Tensor:
        """Coefficient times mean token entropy; in adaptive mode also moves TRL's controller at the step's end."""
        effective = batch.mask * batch.entropy_mask if batch.has("entropy_mask") else batch.mask
        total, count = (outputs.entropies * effective).sum(), effective.sum()
        coefficient = self.entropy_coef
        # The controller's state is that of the last optimizer step, so that all micro-batches of one step agree.
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coefficient = 0.0
        ends_step = mode == "train" and self.accelerator.sync_gradients
        if self.use_adaptive_entropy and mode == "train":
            window = torch.stack((total, count)).detach()
            if self._entropy_window_stats is not None:
                window = window + self._entropy_window_stats
            self._entropy_window_stats = None if ends_step else window
            if ends_step:
                self._move_entropy_coefficient(window)
        if ends_step:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
        return coefficient * total / count.clamp(min=1.0)

    def _move_entropy_coefficient(self, window: Tensor) -> None:
        """One step of TRL's controller towards `entropy_target`, from the entropy of the whole optimizer step."""
        total, count = self.accelerator.reduce(window, reduction="sum")
        entropy = (total / count.clamp(min=1.0)).item()
        low = entropy <= self.args.entropy_target
        moved = self.entropy_coef + (self.args.entropy_coef_delta if low else -self.args.entropy_coef_delta)
        self.entropy_coef = min(moved, self.args.entropy_coef_max) if low else max(moved, self.args.entropy_coef_min)
        self._last_world_entropy = entropy

    @staticmethod
    def _token_average(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, str, str]:
        return (values.detach() * mask).sum(), mask.sum(), "micro_batch", "mean"
