"""Quality: completions move towards the reference answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...base import Metrics, PolicyLoss
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PolicyBatch, Rollout
from ..policy.similarity import state_distance


@LossFunctionRegistry.register("quality")
class QualityLoss(PolicyLoss):
    """Distance of a completion's state to that of the reference answer in the column `target`.

    loss_i = d(h_i, t_i),  t_i = state of the reference answer to i's prompt at rollout,  d = |h/|h| - t/|t||  in [0, 2)

    States are means of the last hidden state over the tokens of the completion, or of the reference answer in its
    place, compared by direction. The policy encodes the reference answers once per generation batch, one forward pass
    more, without gradient; the gradient flows through h_i. An empty text leaves its completions out, as does a
    completion without a scored token: they give 0. The column must be there in every row, as text.

    Deviates from the tutorial, which takes states of zeros where there is no target.

    Errors: The data set has no column `target`.

    Source: After NeMo RL's tutorial on custom losses.
    """

    requires = frozenset({"pooled_hidden"})
    rollout_requires = frozenset({"pooled_hidden"})
    columns = ("target",)
    column_examples = {"target": ("4", "blue", "a tree", "12 + 7")}
    surrogate = False
    reduction = "sequence_mean"

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        targets = _texts(rollout.columns["target"])
        states = rollout.encode(targets)
        given = states.new_tensor([bool(text) for text in targets]) > 0
        return {"target_state": states, "has_target": given & (rollout.mask > 0).any(dim=1)}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        distance = state_distance(model_outputs.pooled_hidden, batch["target_state"])
        return distance.masked_fill(~batch["has_target"], 0), {}


def _texts(column: Any) -> list[str]:
    """The column's values, which the policy encodes as they are."""
    wrong = [type(value).__name__ for value in column if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"the column 'target' holds the reference answers as text, found {wrong[0]}")
    return list(column)
