"""`trl.DPOTrainer` with the objective from the registry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from ..balancing.gramian import watch_whole
from ..reductions import evaluate, reduce_loss
from ..summaries import summarise
from ..types import Denominators, ModelOutputs, PreferenceBatch, masked_sum
from .base import LossFunctionTrainer
from .columns import COLUMN_PREFIX, ColumnCollator
from .config import CustomDPOConfig
from .forward import PolicyForward, RecordingModel, keep_differentiable
from .reference_adapter import check_saving, reference_adapter

#: Means over the pairs of the margin and of its square, from which its standard deviation is made.
_PAIR_MEAN, _PAIR_SQUARE = "rewards/margins/pair_mean", "rewards/margins/pair_square"


class CustomDPOTrainer(LossFunctionTrainer, DPOTrainer):
    """`trl.DPOTrainer` whose objective is a loss from the registry.

    Takes TRL's arguments and `loss_function`; so does `CustomDPOConfig`. Without one it is TRL's trainer, unchanged.

    Args:
        *args, **kwargs: As for `trl.DPOTrainer`.
        loss_function: A name, `{"type": name, **hyperparameters}`, a loss object or a function.

    Raises:
        LossConfigError: The loss cannot be built, its columns are missing, or an option of the config cannot be
            honoured with it. Raised before a model is loaded.
    """

    _default_config = CustomDPOConfig
    _default_suffix = "DPO"

    def __init__(self, *args: Any, loss_function: Any = None, **kwargs: Any) -> None:
        arguments = self._choose_loss(DPOTrainer, loss_function, args, kwargs)
        with reference_adapter(arguments["model"]):
            super().__init__(**arguments)
        keep_differentiable(self.model)
        check_saving(self.model, self.args)
        self._set_up_loss()
        # Counts of the optimizer step under way, and how many of its micro-batches are still to come.
        self._window: Denominators | None = None
        self._window_left = 0
        self._local_tokens: Tensor | int = 0  # an int, so that the sum stays exact
        if self._columns:
            self.data_collator = ColumnCollator(self.data_collator, self._columns)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return super().compute_ref_log_probs(
            model, {name: value for name, value in inputs.items() if not name.startswith(COLUMN_PREFIX)}
        )

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        keep_differentiable(self.model)  # within the constructor already
        return super()._precompute_ref_logps(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batch_samples, num_items = super().get_batch_samples(*args, **kwargs)
        if self.loss_function is not None and batch_samples:
            self._window = self._count(batch_samples)
            self._window_left = len(batch_samples)
        return batch_samples, num_items

    def _count(self, batch_samples: list[dict[str, Any]]) -> Denominators:
        """Denominators of the optimizer step: pairs and tokens of all its micro-batches, on all ranks."""
        masks = [batch["completion_mask"][:, 1:] for batch in batch_samples]
        pairs = sum(mask.size(0) // 2 for mask in masks)
        tokens = torch.stack([torch.stack((mask.sum(), mask[: mask.size(0) // 2].sum())) for mask in masks]).sum(0)
        counts = torch.cat((tokens.new_full((1,), pairs), tokens)).to(self.accelerator.device, torch.float32)
        # The Trainer divides by the number of micro-batches, and ranks are averaged: undo both here.
        counts = self.accelerator.reduce(counts, "sum").clamp(min=1) / (len(masks) * self.accelerator.num_processes)
        fraction = 1 / (len(masks) * self.accelerator.num_processes)
        return Denominators(sequences=counts[0], tokens=counts[1], chosen_tokens=counts[2], step_fraction=fraction)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The registry's loss on one micro-batch; TRL's own without one."""
        if self.loss_function is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        try:
            return self._registry_loss(model, dict(inputs), return_outputs)
        except ValueError as error:
            if "Image features and image tokens do not match" in str(error) and self.args.max_length is not None:
                raise ValueError(
                    f"`max_length={self.args.max_length}` cut image tokens off whose image features remain; raise it "
                    "or set it to None"
                ) from error
            raise

    def _registry_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        loss_function = self._loss_in_mode()
        columns = self._take_columns(inputs)
        forward = PolicyForward(
            model,
            backbone=self._backbone(),
            requires=loss_function.requires,
            log_sum_sq_probs=self.use_weighting,
        )
        model_inputs = {
            name: value
            for name, value in inputs.items()
            if name not in ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        } | {"use_cache": False}
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = forward(**model_inputs, **router, labels=labels)

        mask = inputs["completion_mask"][:, 1:]
        length = mask.size(1)
        outputs = ModelOutputs(
            per_token_logps=output.log_probs[:, -length:],
            mask=mask,
            entropies=output.entropy[:, -length:],
            completion_lengths=inputs["completion_mask"].sum(1),
            token_weights=self._token_weights(mask),
            logits=forward.logits,
            second_logits=forward.second_logits,
            **forward.hidden_fields(inputs["completion_mask"], inputs["attention_mask"]),
            **self._reference(inputs, length),
        )
        batch = PreferenceBatch(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mask=mask,
            columns=columns,
            pair_weights=self._pair_weights(output, outputs),
            ranks=self._ranks,
            denominators=self._denominators(mask.size(0) // 2),
        )
        raw, metrics = evaluate(loss_function, batch, outputs)
        loss = reduce_loss(loss_function, raw, batch)
        watch_whole(loss_function, loss, batch, outputs)
        watched = {"per_token_logps": outputs.per_token_logps, "ref_logps": outputs.ref_logps}
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output.aux_loss
            watched["aux_loss"] = output.aux_loss
        self._end_micro_batch(loss, metrics, watched)
        self._collect(inputs, outputs, output, summarise(self._named(metrics), mask, loss_function.name))
        if return_outputs:  # for `compute_metrics`, which wants the logits that the fused head never builds
            with torch.no_grad():
                return loss, model(**model_inputs, **router)
        return loss

    def _denominators(self, pairs: int) -> Denominators | None:
        """The optimizer step's, for a micro-batch that the training loop announced; else the micro-batch's own."""
        if not self.model.training or self._window_left == 0:
            return None
        self._window_left -= 1
        return replace(self._window, share=pairs * self._window.step_fraction / self._window.sequences)

    def _reference(self, inputs: dict[str, Any], length: int) -> dict[str, Tensor]:
        """Reference log-probabilities: precomputed sums, or one forward through the reference TRL chooses."""
        if self.precompute_ref_logps:
            return {"ref_sums": torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))}
        recording = RecordingModel(self.model if self.ref_model is None else self.ref_model)
        sums = self.compute_ref_log_probs(recording, inputs)
        reference = {"ref_sums": torch.cat(sums)}
        if "ref_per_token_logps" in self.loss_function.requires:
            reference["ref_per_token_logps"] = recording.outputs.log_probs[:, -length:]
        return reference

    def _token_weights(self, mask: Tensor) -> Tensor | None:
        """LD-DPO (arXiv:2409.06411): tokens beyond the shorter completion of the pair count `ld_alpha`, (2B, T)."""
        if self.ld_alpha is None:
            return None
        shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
        position = mask.cumsum(1)
        return torch.where(position > shared.unsqueeze(1), self.ld_alpha, 1.0)

    def _pair_weights(self, output: Any, outputs: ModelOutputs) -> Tensor | None:
        """WPO (arXiv:2406.11827, equation 2): probability of both completions under the policy, length-normalised and
        aligned by the policy's own sum of squared probabilities, (B,), detached."""
        if not self.use_weighting:
            return None
        length = outputs.mask.size(1)
        aligned = outputs.per_token_logps.detach() - output.log_sum_sq_probs[:, -length:]
        lengths = outputs.mask.sum(1).clamp(min=1)
        chosen, rejected = torch.exp(masked_sum(aligned, outputs.mask) / lengths).chunk(2)
        return chosen * rejected

    def _collect(self, inputs: dict[str, Any], outputs: ModelOutputs, output: Any, extra: dict[str, Any]) -> None:
        """Keep TRL's metrics and the loss's own on the device until something logs."""
        mode = "train" if self.model.training else "eval"
        mask, length = outputs.mask, outputs.mask.size(1)
        pairs = mask.size(0) // 2
        found = [getattr(leaf.owner_of("beta"), "beta", None) for leaf in self.loss_function.leaves()]
        beta = next((value for value in found if isinstance(value, (int, float, Tensor))), self.beta)
        with torch.no_grad():
            # The chosen ones are the first half: one sum serves both.
            tokens = mask.unflatten(0, (2, pairs)).sum((1, 2))
            mean_logits = masked_sum(output.mean_logits[:, -length:], mask).view(2, pairs).sum(1)
            rewards = (beta * outputs.log_ratios).view(2, pairs)
            margins = rewards[0] - rewards[1]
            correct = (output.is_top1[:pairs, -length:] * mask[:pairs]).sum()
            rewards_of, logps_of = rewards.sum(1), outputs.logps.view(2, pairs).sum(1)
            sums: dict[str, tuple[Tensor, Tensor | float]] = {
                "entropy": (outputs.entropies.sum(), tokens.sum()),
                "logits/chosen": (mean_logits[0], tokens[0]),
                "logits/rejected": (mean_logits[1], tokens[1]),
                "mean_token_accuracy": (correct, tokens[0]),
                "rewards/chosen": (rewards_of[0], pairs),
                "rewards/rejected": (rewards_of[1], pairs),
                "rewards/accuracies": ((rewards[0] > rewards[1]).sum(), pairs),
                "rewards/margins": (margins.sum(), pairs),
                "logps/chosen": (logps_of[0], pairs),
                "logps/rejected": (logps_of[1], pairs),
            }
            if self.aux_loss_enabled:
                sums["aux_loss"] = (output.aux_loss.detach(), 1.0)
            if mode == "train":
                self._local_tokens = self._local_tokens + inputs["attention_mask"].sum()
        stock = {name: (total, count, "micro_batch", "mean") for name, (total, count) in sums.items()}
        self._buffers[mode].add(stock | self._spread(margins) | extra)

    @staticmethod
    def _spread(margins: Tensor) -> dict[str, tuple[Tensor, float, str, str]]:
        """What the spread of the margins over all pairs since the last log is made of; margins (B,), detached."""
        # Squares of float32 lose the spread where it is small beside the mean; mps has no float64.
        exact = margins if margins.device.type == "mps" else margins.double()
        pairs = float(margins.numel())
        return {
            _PAIR_MEAN: (exact.sum(), pairs, "log", "mean"),
            _PAIR_SQUARE: (exact.square().sum(), pairs, "log", "mean"),
            "rewards/margins/min": (margins.amin(), pairs, "log", "min"),
            "rewards/margins/max": (margins.amax(), pairs, "log", "max"),
        }

    def _abandon_step(self) -> None:
        super()._abandon_step()
        self._window_left, self._local_tokens = 0, 0

    def _flush_metrics(self, mode: str) -> None:
        if self._buffers[mode]:
            # As a metric that every rank reports once, the token count shares the metrics' collective.
            tokens = torch.as_tensor(self._local_tokens, device=self.accelerator.device)
            self._buffers[mode].add({"num_tokens": (tokens, 1.0, "log", "mean")})
            self._local_tokens = 0
        super()._flush_metrics(mode)

    def _store_metrics(self, mode: str, reduced: Mapping[str, float]) -> None:
        tokens = round(reduced["num_tokens"] * self.accelerator.num_processes)
        self._total_train_tokens += tokens // self._tp_size
        stored = {**reduced, "num_tokens": self._total_train_tokens}
        mean, square = stored.pop(_PAIR_MEAN, None), stored.pop(_PAIR_SQUARE, None)
        if mean is not None and square is not None:
            variance = square - mean * mean
            # Rounding can leave a variance of 0 slightly below it; NaN stays NaN.
            stored["rewards/margins/std"] = 0.0 if variance < 0 else math.sqrt(variance)
        super()._store_metrics(mode, stored)
