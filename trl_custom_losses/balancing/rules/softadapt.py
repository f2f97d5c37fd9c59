"""SoftAdapt: more weight for the losses that rise, or fall least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ...hyperparameters import check_choice, check_range
from ...state import host
from .dwa import WindowedRule
from .rule import balance

Variant = Literal["original", "normalized", "loss_weighted"]

# First derivative at the oldest of order + 1 equally spaced points, to this order of accuracy.
_FORWARD_DIFFERENCES = {
    1: (-1, 1),
    2: (-3 / 2, 2, -1 / 2),
    3: (-11 / 6, 3, -3 / 2, 1 / 3),
    4: (-25 / 12, 4, -3, 4 / 3, -1 / 4),
    5: (-137 / 60, 5, -5, 10 / 3, -5 / 4, 1 / 5),
}
# A sum of slopes, or a loss, of 0 is no denominator and no size.
_TINY = 1e-8


class SoftAdaptWeights(WindowedRule):
    """SoftAdapt: the softmax of the losses' slopes.

    original:       multiplier = K softmax_k(beta s_k)
    normalized:     multiplier = K softmax_k(beta s_k / sum_j |s_j|)
    loss_weighted:  multiplier = K |L_k| exp(beta s_k) / sum_j |L_j| exp(beta s_j),  L the mean over the points
    weight = initial weight * multiplier

    The slope s is a forward difference over the last accuracy_order + 1 points, per point; a point is a loss averaged
    over `window` optimizer steps. `original` depends on the scale of the losses, `normalized` does not.

    Deviations: the authors' weights sum to 1; these sum to K, so that the step keeps its size. `normalized` divides by
    the sum of magnitudes: their code divides by the signed sum, which is negative while losses fall and so turns the
    order round. `loss_weighted` takes magnitudes, since policy losses may be negative.

    Args:
        names: The objectives' names.
        initial_weights: Their weights before their multipliers; with ones the weights are the paper's times K.
        variant: "original", "normalized" or "loss_weighted".
        beta: Sharpness; above 0 favours the losses that do worst, below 0 those that do best.
        window: Optimizer steps averaged into one point, >= 1.
        accuracy_order: Of the difference, 1 to 5. High orders follow curved histories but amplify noise (order 4 by a
            factor of 5.6, order 1 of 1.4). The authors take the highest that their stored losses allow.

    Source: Heydari et al. 2019, arXiv:1912.12355; the authors' code (dr-aheydari/SoftAdapt).
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        initial_weights: Sequence[float],
        variant: Variant = "original",
        beta: float = 0.1,
        window: int = 10,
        accuracy_order: int = 1,
    ) -> None:
        check_range("accuracy_order", accuracy_order, at_least=1, at_most=max(_FORWARD_DIFFERENCES))
        super().__init__(names=names, initial_weights=initial_weights, window=window, points=accuracy_order + 1)
        self.variant = check_choice("variant", variant, Variant)
        self.beta = check_range("beta", beta, above=float("-inf"), below=float("inf"))
        self.accuracy_order = accuracy_order

    def multipliers(self, ready: Tensor) -> Tensor:
        slopes = host(_FORWARD_DIFFERENCES[self.accuracy_order]) @ self.means
        if self.variant == "normalized":
            slopes = slopes / slopes[ready].abs().sum().clamp(min=_TINY)
        sizes = self.means.mean(0).abs().clamp(min=_TINY) if self.variant == "loss_weighted" else None
        return balance(self.beta * slopes, ready, sizes)
