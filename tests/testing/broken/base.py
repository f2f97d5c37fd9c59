"""What the broken losses differ from in one place, and how they are put together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_custom_losses import Loss, ModelOutputs, PolicyBatch, PolicyLoss, PreferenceBatch, PreferenceLoss

Cases = dict[str, list[tuple[Any, str]]]


def right_margin(outputs: ModelOutputs) -> Tensor:
    chosen, rejected = outputs.mean_logps.chunk(2)
    return chosen - rejected


class Right(PreferenceLoss):
    """Nothing is wrong with it; the others differ from it, or from `RightPolicy`, in one place."""

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def of(self, margin: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * margin)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        margin = right_margin(model_outputs)
        return self.of(margin), {"margin": margin.detach()}


class RightPolicy(PolicyLoss):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return -batch.advantages * model_outputs.per_token_logps, {}


class RightOnLogits(PreferenceLoss):
    """A penalty on the logits of scored positions; what adds to it, adds to `of`."""

    requires = frozenset({"logits"})
    prefers_chosen = False

    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return scored(logits, outputs).square().mean(-1).sum(1)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return self.of(precise(model_outputs.logits), model_outputs), {}


def scored(logits: Tensor, outputs: ModelOutputs) -> Tensor:
    """Logits, 0 where nothing is scored."""
    return logits.masked_fill(outputs.mask.unsqueeze(-1) == 0, 0)


def composed(*losses: Loss) -> dict[str, Any]:
    """A config of their sum."""
    return {"type": "composed", "components": [(f"part_{number}", 1.0, loss) for number, loss in enumerate(losses)]}


def precise(values: Tensor) -> Tensor:
    """Half precision as float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
