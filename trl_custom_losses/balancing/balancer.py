"""Weights of objectives from the angles between their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LossConfigError
from ..hyperparameters import check_choice, check_range, check_type, hyperparameters_of, resolve, suggestion
from ..state import HostState, host, host_zeros
from .gradients import AGGREGATORS, Aggregator
from .gramian import cosines

Source = Literal["previous", "current"]


class GradientBalancer(HostState):
    """Factors for the objectives of a sum, by an aggregator of their gradients.

    factors_t = aggregator(D E_t-1 D),  E_t = decay E_t-1 + (1 - decay) G_t,  D = diag(weights)

    G is the Gramian of the objectives' gradients with respect to the tensors through which they reach the model
    (log-probabilities, entropies, pooled hidden states), of the whole optimizer step: those of micro-batches and ranks
    add. So the factors of a step follow from the steps before it and do not depend on how a batch is split; the first
    step has all factors 1. No gradient of the model is needed, so there is one ordinary backward pass.

    Log-probabilities stand in for the parameters: two objectives that pull one token's log-probability in opposite
    directions conflict, those that pull different tokens do not, although they may meet in the parameters.

    Args:
        aggregator: Makes factors from a Gramian.
        names: Of the objectives.
        decay: Of the moving average, 0 <= decay < 1; 0 takes the last step's Gramian alone.
        source: "previous", or "current" for the micro-batch's own Gramian over all ranks, which costs a collective and
            a wait for the device each time.
    """

    def __init__(
        self, *, aggregator: Aggregator, names: Sequence[str], decay: float = 0.9, source: Source = "previous"
    ) -> None:
        super().__init__()
        self.aggregator = aggregator
        self.names = tuple(names)
        self.decay = check_range("decay", decay, at_least=0, below=1)
        self.source = check_choice("gramian", source, Source)
        self.step = 0
        size = len(self.names)
        self.register_buffer("average", host_zeros(size, size))
        self.register_buffer("steps", host(0, torch.int64))

    def factors(self, gramian: Tensor | None, weights: Sequence[float]) -> list[float]:
        """What each objective's weight is to be multiplied by; 1 for an objective that has no gradient.

        Args:
            gramian: Of the unweighted objectives, (m, m); None takes the moving average.
            weights: Of the objectives, m of them.
        """
        if gramian is None:
            if self.steps == 0:
                return [1.0] * len(self.names)
            gramian = self.average
        scale = host(list(weights))
        weighted = scale.unsqueeze(1) * gramian.to("cpu", torch.float64) * scale
        factors = torch.ones_like(scale)
        # An objective without a gradient, such as one of weight 0, has no say; MGDA would give it all the weight.
        active = (weighted.diagonal() > 0).nonzero().flatten()
        if len(active) > 1:
            factors[active] = self.aggregator(weighted[active][:, active], self.step)
        return factors.tolist()

    def update(self, gramian: Tensor) -> None:
        """Take in an optimizer step's Gramian, (m, m); one that is not finite is left out."""
        if not gramian.isfinite().all():
            return
        first = bool(self.steps == 0)
        self.average.copy_(gramian if first else self.decay * self.average + (1 - self.decay) * gramian)
        self.steps += 1

    def cosines(self, gramian: Tensor) -> dict[str, float]:
        """Cosine between each two objectives' gradients, by metric name; none for a gradient of length 0."""
        return cosines(self.names, gramian)

    def extra_repr(self) -> str:
        return f"{type(self.aggregator).__name__}, decay={self.decay}, gramian={self.source!r}"


def make_balancer(config: str | Mapping[str, Any], names: Sequence[str]) -> GradientBalancer:
    """The balancer that `balancing` describes: a name, or a dict `{type, decay, gramian, **options}`.

    Raises:
        LossConfigError: The aggregator or an option is unknown, or a value out of range.
    """
    settings = {"type": config} if isinstance(config, str) else dict(config)
    name = settings.pop("type", None)
    if not isinstance(name, str) or name not in AGGREGATORS:
        raise LossConfigError(
            f"'balancing': there is no method {name!r}{suggestion(str(name), AGGREGATORS)}; known: "
            f"{', '.join(AGGREGATORS)}"
        )
    if len(names) < 2:
        raise LossConfigError(f"'balancing' needs at least two components, found {len(names)}")
    where = f"balancing '{name}'"
    if settings.get("gramian") == "current" and "decay" in settings:
        raise LossConfigError(f"{where}: 'decay' averages over the steps before, which `gramian: current` leaves out")
    decay = check_type(settings.pop("decay", 0.9), float, f"{where}, 'decay'")
    source = settings.pop("gramian", "previous")
    try:
        options, _ = resolve(name, hyperparameters_of(AGGREGATORS[name]), settings, {}, "")
        return GradientBalancer(aggregator=AGGREGATORS[name](**options), names=names, decay=decay, source=source)
    except LossConfigError as error:
        raise LossConfigError(f"{where}: {error}") from error
