"""A bound on what one loss may push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...base import Loss, Metrics
from ...composition import Batch, LossOfLosses, build_component, merge_metrics
from ...hyperparameters import check_choice, check_range
from ...registry import BuildContext, LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch, gradients_of

Per = Literal["batch", "sequence"]


@LossFunctionRegistry.register("clipped_loss")
class ClippedLoss(LossOfLosses):
    """Any loss with a bound on its gradient with respect to the log-probabilities, for the whole optimizer step.

    value = base_loss,  gradient = g min(1, max_grad_norm sqrt(s) / ||g||),  g = d base_loss / d log-probabilities

    g is taken with respect to the tensors through which the loss reaches the model: per-token log-probabilities,
    entropies and pooled hidden states, or logits where a loss of the run requires those. s is the share that the
    micro-batch has in the step's pairs or sequences, over accumulation and ranks. Parts of a batch are different
    coordinates of g, so their squares add up to at most max_grad_norm^2 however the batch is split. With `per:
    sequence` each of a micro-batch's B pairs or sequences is bounded, with s / B in place of s, and the gradient of the
    step does not depend on the split, unless the base's does.

    What is bounded is this loss alone, before its weight if it is a component, and without the terms that the trainer
    adds (KL, entropy bonus, MoE loss). The bound is part of the graph, so scaling the loss afterwards scales the
    clipped gradient. A gradient that is not finite is not clipped, so that it shows. Parameters that the base learns
    get, per batch, the same factor, and per sequence their own gradient.

    The tutorial's code clips gradients of the parameters in the forward pass, where there are none yet.

    Logs `base_loss`, `grad_norm` (before clipping, over sqrt(s): what is compared with max_grad_norm; a trainer, which
    has a `grad_norm` of its own, calls it `clipped_loss/grad_norm`), `clip_fraction` (of the micro-batches, or pairs or
    sequences), and what the base logs. No `grad_norm` in evaluation.

    Args:
        base_loss: A loss or composition of either family: its name, or a dict with `type` and hyperparameters.
        max_grad_norm: Bound on the step's gradient norm, > 0, in units of the loss per nat.
        per: "batch" keeps the gradient's direction; "sequence" keeps that of each pair's or sequence's, and holds
            outliers back without the rest.

    Source: the source tutorial; norm clipping, Pascanu et al. 2012, arXiv:1211.5063; per example, Abadi et al. 2016,
    arXiv:1607.00133.
    """

    stop_gradient = True
    example = {"base_loss": {"type": "sigmoid"}}

    def __init__(self, *, base_loss: Loss | str | dict, max_grad_norm: float = 1.0, per: Per = "batch") -> None:
        super().__init__({"base": _build(base_loss, BuildContext())})
        self.max_grad_norm = check_range("max_grad_norm", max_grad_norm, above=0)
        self.per = check_choice("per", per, Per)

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> ClippedLoss:
        """Build the base loss too."""
        return cls(**{**values, "base_loss": _build(values["base_loss"], context)})

    def forward(self, batch: Batch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        contributions, reported = self.contributions(batch, model_outputs)
        loss = contributions["base"]
        own = {"base_loss": loss.detach() * batch.denominators.micro_batches}
        if torch.is_grad_enabled() and model_outputs.anchors():
            clip = self._clip_batch if self.per == "batch" else self._clip_sequences
            loss, clipping = clip(loss, batch, model_outputs)
            own |= clipping
        return loss, own | merge_metrics(reported, taken=own)

    def _clip_batch(self, loss: Tensor, batch: Batch, outputs: ModelOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        norm = _norm(_row_norms(outputs.gradients(loss)), dim=0)
        factor, metrics = self._factor(norm, batch, units=1)
        # Equal to the loss, and through the loss's own graph: where the factor is 1, nothing changes by a bit.
        return loss.detach() + factor * (loss - loss.detach()), metrics

    def _clip_sequences(self, loss: Tensor, batch: Batch, outputs: ModelOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        gradients = outputs.gradients(loss)
        units = batch.num_pairs if isinstance(batch, PreferenceBatch) else batch.mask.size(0)
        norms = _norm(_row_norms(gradients).view(-1, units), dim=0)  # a pair's two rows together
        factors, metrics = self._factor(norms, batch, units)
        # Equal to the loss, with the clipped gradients as slopes.
        surrogate = loss.detach()
        for anchor, gradient in zip(outputs.anchors(), gradients, strict=True):
            rows = factors.repeat(anchor.size(0) // units).view(-1, *[1] * (anchor.dim() - 1))
            surrogate = surrogate + (rows * gradient * (anchor - anchor.detach())).sum()
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter, gradient in zip(learned, gradients_of(loss, learned), strict=True):
            surrogate = surrogate + (gradient * (parameter - parameter.detach())).sum()
        return surrogate, metrics

    def _factor(self, norm: Tensor, batch: Batch, units: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What gradients of these norms are to be multiplied by, and metrics.

        Args:
            norm: Of the contribution's gradients, () or (units,).
            batch: Its denominators tell what becomes of the contribution.
            units: How many parts of the micro-batch are bounded one by one.
        """
        share = batch.denominators.share / units
        relative = norm * (batch.denominators.step_fraction / share**0.5)
        factor = torch.where(relative.isfinite(), (self.max_grad_norm / relative).clamp(max=1), 1)
        return factor, {"grad_norm": relative, "clip_fraction": (factor < 1).to(relative.dtype)}


def _build(config: Any, context: BuildContext) -> Loss:
    return build_component(config, context, "'base_loss'")


def _row_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of each row over several tensors of N rows, (N,)."""
    return _norm(torch.stack([_norm(gradient.flatten(1), dim=1) for gradient in gradients]), dim=0)


def _norm(values: Tensor, dim: int) -> Tensor:
    """Euclidean norm, in float32 or better; squares neither overflow nor vanish."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    largest = torch.linalg.vector_norm(values, ord=torch.inf, dim=dim, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return (scale * torch.linalg.vector_norm(values / scale, dim=dim, keepdim=True)).squeeze(dim)
