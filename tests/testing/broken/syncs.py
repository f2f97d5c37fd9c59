"""Losses that make the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import ModelOutputs, PolicyBatch, PreferenceBatch

from .base import Right, RightPolicy


class ReadsANumber(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) / margin.new_tensor(max(margin.max().item(), 1.0))


class Branches(Right):
    def of(self, margin: Tensor) -> Tensor:
        loss = super().of(margin)
        if loss.mean() > 100:
            loss = loss / 2
        return loss


class BranchesInEvaluation(Branches):
    def of(self, margin: Tensor) -> Tensor:
        return Right.of(self, margin) if self.training else super().of(margin)


class TakesAFloat(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * min(float(margin.detach().exp().sum()), 1.0)


class TakesAnInt(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * (1 + int((margin > 100).sum()))


class MakesAList(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * max([1.0, *margin.tolist()])


class MakesAnArray(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * margin.new_tensor(margin.detach().numpy().max())


class TakesPlaces(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * (1 + (margin > 100).nonzero().size(0))


class TakesPlacesByWhere(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * (1 + torch.where(margin > 100)[0].size(0))


class CountsDistinct(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) / torch.unique(margin).numel()


class Repeats(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, _ = super().forward(batch, model_outputs)
        counts = batch.mask.sum(1)
        return loss, {"by_token": torch.repeat_interleave(batch.advantages.squeeze(1), counts).mean()}


class Asks(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * (2 if torch.allclose(margin, margin.new_zeros(())) else 1)


class PrintsATensor(Right):
    def of(self, margin: Tensor) -> Tensor:
        str(margin)
        return super().of(margin)


class FormatsATensor(Right):
    def of(self, margin: Tensor) -> Tensor:
        shown = f"{margin.mean():.3f}"
        return super().of(margin) * (1 if shown else 2)


class PrintsAWord(Right):
    def of(self, margin: Tensor) -> Tensor:
        print("here")
        return super().of(margin)


class IndexesWithAMask(RightPolicy):
    reduction = "token_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, _ = super().forward(batch, model_outputs)
        return loss, {"scored": loss.detach()[batch.mask > 0].mean()}


class IndexesColumnsWithAMask(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, _ = super().forward(batch, model_outputs)
        return loss, {"scored": loss.detach()[:, batch.mask.any(0)].mean()}


class AssignsThroughAMask(Right):
    def of(self, margin: Tensor) -> Tensor:
        weights = torch.zeros_like(margin)
        weights[margin.isfinite()] = torch.ones_like(margin)
        return super().of(margin) * weights


class CatchesTheException(Right):
    def of(self, margin: Tensor) -> Tensor:
        try:
            scale = margin.detach().max().item()
        except Exception:
            scale = 1.0
        return super().of(margin) * min(scale, 1.0)


class _WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (2.0 if gradient.sum().item() > 1e9 else 1.0)


class WaitsInBackward(Right):
    def of(self, margin: Tensor) -> Tensor:
        return _WaitsInBackward.apply(super().of(margin))


class WaitsInAHook(Right):
    def of(self, margin: Tensor) -> Tensor:
        loss = super().of(margin)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * min(gradient.sum().item(), 1.0))
        return loss


class WaitsBeforeTheStep(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.register_buffer("scale", torch.ones(()))

    def on_step_begin(self, step: int) -> None:
        self.beta = self.scale.item()


class WaitsInAMetric(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss, {"margin": metrics["margin"].cpu()}


class MovesToTheHost(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss, {"margin": metrics["margin"].to("cpu")}


class MovesToTheHostByName(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin.to(device=torch.device("cpu")))


class MakesItsTensorsOnTheHost(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * torch.ones(margin.size(0))


class IsOnTheHost(Right):
    def of(self, margin: Tensor) -> Tensor:
        return torch.zeros(margin.size(0), requires_grad=True)


SYNCS: list[tuple[Any, str]] = [
    (ReadsANumber, "`item` waits for the device (at "),
    (Branches, "if loss.mean() > 100"),
    (BranchesInEvaluation, "if loss.mean() > 100"),
    (TakesAFloat, "`__float__` waits"),
    (TakesAnInt, "`__int__` waits"),
    (MakesAList, "`tolist` waits"),
    (MakesAnArray, "`numpy` waits"),
    (TakesPlaces, "`nonzero` waits"),
    (TakesPlacesByWhere, "`where` with one argument"),
    (CountsDistinct, "unique"),
    (Repeats, "`repeat_interleave` by a tensor"),
    (Asks, "`allclose` waits"),
    (PrintsATensor, "printing a tensor"),
    (FormatsATensor, "printing a tensor"),
    (PrintsAWord, "prints 'here'"),
    (IndexesWithAMask, "indexing with a mask waits"),
    (IndexesColumnsWithAMask, "indexing with a mask waits"),
    (AssignsThroughAMask, "indexing with a mask waits"),
    (CatchesTheException, "`item` waits"),
    (WaitsInBackward, "cannot be called on meta tensors"),
    (WaitsInAHook, "cannot be called on meta tensors"),
    (WaitsBeforeTheStep, "`item` waits"),
    (WaitsInAMetric, "`cpu` waits"),
    (MovesToTheHost, "to('cpu')"),
    (MovesToTheHostByName, "to('cpu')"),
    (MakesItsTensorsOnTheHost, "cannot run where tensors hold no values"),
    (IsOnTheHost, "the loss is on the device 'cpu'"),
]
