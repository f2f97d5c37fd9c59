"""Losses to which padding, order or the splitting of a batch matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import ModelOutputs, PolicyBatch, PreferenceBatch, PreferenceLoss

from .base import Cases, Right, RightPolicy, composed, right_margin

# padding


class MeanOverPositions(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -model_outputs.per_token_logps.mean(1), {}


class ScaledByPositions(Right):
    """Off by one in 100,000 for each position."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * (1 + 1e-5 * model_outputs.mask.size(1)), metrics


class CountsFromTheBeginning(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        values = model_outputs.per_token_logps
        return -(values / torch.arange(1, values.size(1) + 1, device=values.device)).sum(1), {}


class ComparesNeighbours(RightPolicy):
    """The first term of a token is the difference to the one before, which a tool's result may stand between."""

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        values = model_outputs.per_token_logps
        smooth = (values[:, 1:] - values[:, :-1]).square() * batch.mask[:, 1:] * batch.mask[:, :-1]
        return super().forward(batch, model_outputs)[0] + torch.nn.functional.pad(smooth, (1, 0)), {}


class CutsAtTen(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -model_outputs.per_token_logps[:, :10].sum(1), {}


class PaddingInTheGradient(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) + (margin - margin.detach()) * self.positions

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        self.positions = model_outputs.mask.size(1)
        return super().forward(batch, model_outputs)


# permutation


class WeighsByPosition(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * torch.arange(1, margin.size(0) + 1, device=margin.device)


class WeighsByPositionInFive(WeighsByPosition):
    minimum_batch = 5


class FavoursTheMiddle(Right):
    """Symmetric, so that only of an odd number of pairs another order shows; the middle of five is not its own."""

    minimum_batch = 5

    def of(self, margin: Tensor) -> Tensor:
        places = torch.arange(margin.size(0), device=margin.device)
        return super().of(margin) * (1 + torch.minimum(places, places.flip(0)))


class OrderInTheGradient(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) + (margin - margin.detach()) * torch.arange(margin.size(0), device=margin.device)


# micro_batches


class AveragesItself(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss.mean(), metrics


class AveragesItselfInTheGradient(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) + (margin - margin.detach()) / margin.size(0)


class MultipliesByTheBatch(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] * batch.mask.size(0), {}


class LocalMean(RightPolicy):
    reduction = "local_token_mean"


class DividesByTheMicroBatches(LocalMean):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss / batch.denominators.micro_batches, metrics


# batch_coupling


class SubtractsTheBatchMean(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin - margin.mean())


class SaysThatItIsCoupled(Right):
    batch_coupled = True


class DividesByTheSpread(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of((margin - margin.mean()) / margin.std())


class CouplesOnePair(Right):
    """The last pair's loss depends on the first's, and no other on any."""

    def of(self, margin: Tensor) -> Tensor:
        if margin.size(0) == 1:
            return super().of(margin)
        return super().of(torch.cat((margin[:-1], margin[-1:] - 1e-3 * margin[:1])))


class CouplesRows(PreferenceLoss):
    """One value for each of 2B completions."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        values = model_outputs.mean_logps
        return (values - values.mean() - 0.1 * right_margin(model_outputs).mean()).square(), {}


class ComparesNeighbouringPairs(Right):
    batch_coupled = True

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        margin = right_margin(model_outputs)
        return loss + (margin - margin.roll(1)) ** 2, metrics


INVARIANCES: Cases = {
    "padding": [
        (MeanOverPositions, "with 1 unscored positions at the end"),
        (ScaledByPositions, "the loss with 1 unscored positions at the end"),
        (CountsFromTheBeginning, "with 1 unscored positions of a prompt"),
        (ComparesNeighbours, "with 1 unscored positions within the completions"),
        (CutsAtTen, "with 7 unscored positions of a prompt"),
        (PaddingInTheGradient, "the gradient (rows 'logps') with 1 unscored positions at the end"),
    ],
    "permutation": [
        (WeighsByPosition, "the loss of the pairs or sequences in another order"),
        (WeighsByPositionInFive, "the loss of the pairs or sequences in another order"),
        (ComparesNeighbouringPairs, "the loss of the pairs or sequences in another order"),
        (FavoursTheMiddle, "the loss of the pairs or sequences in another order"),
        (OrderInTheGradient, "the gradient (rows 'logps') of the pairs or sequences in another order"),
    ],
    "micro_batches": [
        (AveragesItself, "the loss summed over 2 micro-batches"),
        (AveragesItselfInTheGradient, "the gradient (rows 'logps') summed over 2 micro-batches"),
        (MultipliesByTheBatch, "summed over 2 micro-batches"),
        (DividesByTheMicroBatches, "the mean of their own losses is"),
        (composed(Right(), AveragesItself()), "summed over 2 micro-batches"),
        (composed(LocalMean(), MultipliesByTheBatch()), "micro-batches of 'part_1'"),
        (composed(RightPolicy(), DividesByTheMicroBatches()), "micro-batches of 'part_1'"),
    ],
    "batch_coupling": [
        (SubtractsTheBatchMean, "declares `batch_coupled = False`"),
        (SaysThatItIsCoupled, "declares `batch_coupled = True`"),
        (DividesByTheSpread, "and nan alone"),
        (CouplesOnePair, "the loss of row 3 is"),
        (CouplesRows, "declares `batch_coupled = False`"),
        (composed(Right(), SubtractsTheBatchMean()), "'part_1' declares `batch_coupled = False`"),
        (composed(Right(), SaysThatItIsCoupled()), "'part_1' declares `batch_coupled = True`"),
    ],
}
