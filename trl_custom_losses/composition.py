"""Losses made of losses: what every composition shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .balancing.balancer import make_balancer
from .balancing.gramian import step_gramian, watch_parts
from .base import Loss, Metrics
from .errors import LossConfigError, named
from .hyperparameters import check_type
from .reductions import evaluate, reduce_loss
from .registry import BuildContext, LossFunctionRegistry
from .schedules import Schedule, as_schedule, is_schedule
from .types import ModelOutputs, PolicyBatch, PreferenceBatch, Rollout, TokenReduction

Batch = PreferenceBatch | PolicyBatch
Weight = float | Schedule

#: `<name>_loss` is logged for something else.
_TAKEN_NAMES = ("total", "policy", "aux", "train", "eval")


class LossOfLosses(Loss):
    """Base of losses that hand (part of) their work to others: it needs what they need and prepares what they prepare.

    Args:
        components: The losses by name.
    """

    composite = True

    def __init__(self, components: Mapping[str, Loss]) -> None:
        super().__init__()
        if not components:
            raise LossConfigError("'components' must list at least one loss")
        for name, loss in components.items():
            if not isinstance(loss, Loss):
                raise LossConfigError(
                    f"component {name!r}: expected a loss object, found {loss!r}; `LossFunctionRegistry.build` makes "
                    "one of a name, a dict or a function"
                )
            if not isinstance(name, str) or not name or "." in name:
                raise LossConfigError(f"a component's 'name' must be text without dots, found {name!r}")
            if name in _TAKEN_NAMES:
                raise LossConfigError(
                    f"the metric '{name}_loss' is the trainer's; choose another component name than {name!r}"
                )
            if sum(other is loss for other in components.values()) > 1:
                raise LossConfigError(
                    f"component {name!r}: the same object stands for several components, which would share its state; "
                    "make one for each"
                )
            loss.name = loss.name or name
        families = sorted({str(loss.family) for loss in components.values()})
        if len(families) > 1:
            raise LossConfigError(f"components are of one family, found {' and '.join(families)}")
        # Not a ModuleDict, which refuses names such as "type" or "train".
        self.losses = nn.ModuleList(components.values())
        self.names: tuple[str, ...] = tuple(components)
        losses = list(components.values())
        self.family = losses[0].family
        self.requires = frozenset().union(*(loss.requires for loss in losses))
        self.rollout_requires = frozenset().union(*(loss.rollout_requires for loss in losses))
        self.columns = tuple(dict.fromkeys(column for loss in losses for column in loss.columns))
        self.column_scorers = _scorers_of(losses)
        self.batch_coupled = any(loss.batch_coupled for loss in losses)
        self.stop_gradient = self.stop_gradient or any(loss.stop_gradient for loss in losses)
        self.minimum_batch = max(loss.minimum_batch for loss in losses)

    def components(self) -> Iterator[tuple[str, Loss]]:
        """The components by name."""
        return zip(self.names, self.losses, strict=True)

    @property
    def kl_reduction(self) -> str | TokenReduction:
        surrogate = next((leaf for leaf in self.leaves() if leaf.surrogate), self.losses[0])
        return surrogate.kl_reduction

    @property
    def prepares(self) -> bool:
        """Whether any component prepares a rollout."""
        return any(loss.prepares for loss in self.losses)

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        """Let each component that wants to prepare the rollout do so, under its own names."""
        prepared: dict[str, Tensor] = {}
        for name, loss in self.components():
            if loss.prepares:
                prepared |= Rollout.scoped_result(name, loss.prepare(rollout))
        return prepared

    def contributions(self, batch: Batch, outputs: ModelOutputs) -> tuple[dict[str, Tensor], dict[str, Metrics]]:
        """Each component's contribution to the step's loss, a scalar before its weight, and its metrics, by name."""
        contributions: dict[str, Tensor] = {}
        reported: dict[str, Metrics] = {}
        for name, loss in self.components():
            scoped = batch.scoped(name)
            raw, reported[name] = evaluate(loss, scoped, outputs)
            contributions[name] = reduce_loss(loss, raw, scoped)
        return contributions, reported


def _scorers_of(losses: Sequence[Loss]) -> dict[str, tuple[str, str]]:
    """How columns are filled, of several losses, which must agree where they share a column."""
    scorers: dict[str, tuple[str, str]] = {}
    for loss in losses:
        for column, scorer in loss.column_scorers.items():
            if scorers.setdefault(column, scorer) != scorer:
                raise LossConfigError(
                    f"the column '{column}' has two scorers, {scorers[column][1]!r} and {scorer[1]!r}; give one"
                )
    return scorers


class ComposableLossFunction(LossOfLosses):
    """Weighted sum of losses on one forward pass: the base of every composition.

    loss = sum_k weight_k * factor_k * reduce_k(loss_k),  factor_k = 1 without balancing

    Logs `<component>_loss` (before its weight), `<component>_weight` (with its factor) and `total_loss`. A metric that
    one component reports keeps its name; one that several report is logged for each as `<component>/<metric>`. With
    balancing, also `grad_cosine/<a>/<b>`, the cosine between two components' gradients over the optimizer step.

    A `callbacks.GradientMonitorCallback` adds the gradients' norms.

    Args:
        components: The losses, by name or in order; in order, their names are those they were registered under.
        weights: By name or in order, numbers or schedules; 1 where left out.
        balancing: Gradient balancing: "upgrad", "mgda", "pcgrad", "cagrad", or a dict with `type` and options (see
            `balancing.GradientBalancer`). The weights scale the objectives before they are balanced.

    Errors: No component, two of the same name, components of different families, a weight for no component.
    """

    watches_parts = True

    def __init__(
        self,
        components: Mapping[str, Loss] | Sequence[Loss],
        weights: Mapping[str, Weight] | Sequence[Weight] | None = None,
        *,
        balancing: str | dict | None = None,
    ) -> None:
        named = _by_name(components)
        super().__init__(named)
        self.weights: dict[str, float] = dict.fromkeys(named, 1.0)
        self.weight_schedules: dict[str, Schedule] = {}
        for name, weight in _weights_by_name(weights, named).items():
            where = f"component '{name}', 'weight'"
            if is_schedule(weight):
                self.weight_schedules[name] = as_schedule(weight, float, where)
                weight = self.weight_schedules[name].value(0)
            self.weights[name] = check_type(weight, float, where)
        self.balancer = None if balancing is None else make_balancer(balancing, self.names)
        self._factors: dict[str, float] | None = dict.fromkeys(named, 1.0)

    # Weights

    def current_weights(self) -> dict[str, float]:
        """The components' weights at this step, before balancing."""
        return self.weights

    def on_train_begin(self, total_steps: int) -> None:
        for schedule in self.weight_schedules.values():
            schedule.begin(total_steps)

    def move_to_step(self, step: int) -> None:
        super().move_to_step(step)
        for name, schedule in self.weight_schedules.items():
            self.weights[name] = schedule.value(step)
        if self.balancer is not None:
            self.balancer.step = step
            if self.balancer.source == "previous":
                self._factors = None

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> Mapping[str, float] | None:
        if self.balancer is None or "gramian" not in observed:
            return None
        self.balancer.update(observed["gramian"])
        return self.balancer.cosines(observed["gramian"])

    @property
    def observes(self) -> bool:
        """Whether it balances, or a subclass hears of a step's end."""
        return self.balancer is not None or type(self).on_step_end is not ComposableLossFunction.on_step_end

    @property
    def factors(self) -> dict[str, float]:
        """What balancing multiplies the weights by, at this step."""
        if self._factors is None:  # found when first asked for, with whatever weights hooks have set by then
            self._factors = self._find_factors(None)
        return self._factors

    def _find_factors(self, gramian: Tensor | None) -> dict[str, float]:
        weights = self.current_weights()
        found = self.balancer.factors(gramian, [weights[name] for name in self.names])
        return dict(zip(self.names, found, strict=True))

    def gramian(self, contributions: Mapping[str, Tensor], batch: Batch, outputs: ModelOutputs) -> Tensor | None:
        """Inner products between the components' gradients, before weights, (m, m); None if nothing wants them.

        Balancing observes them; with `gramian: current`, it acts on them at once.
        """
        asked = (self.balancer is not None or self.watched) and self.training and torch.is_grad_enabled()
        if not asked or not outputs.anchors():
            return None
        gramian = step_gramian(contributions.values(), batch, outputs)
        if self.balancer is not None:
            self.observe("gramian", gramian)
            if self.balancer.source == "current":
                self._factors = self._find_factors(batch.ranks.sum(gramian.detach()))
        return gramian

    # The loss

    def forward(self, batch: Batch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        contributions, reported = self.contributions(batch, model_outputs)
        gramian = self.gramian(contributions, batch, model_outputs)
        factors = self.factors
        weights = {name: weight * factors[name] for name, weight in self.current_weights().items()}
        watch_parts(self, gramian, list(weights.values()))
        total = sum(weights[name] * contribution for name, contribution in contributions.items())
        return total, self.metrics_of(contributions, weights, total, reported, batch)

    def metrics_of(
        self,
        contributions: Mapping[str, Tensor],
        weights: Mapping[str, float | Tensor],
        total: Tensor,
        reported: Mapping[str, Metrics],
        batch: Batch,
    ) -> dict[str, Any]:
        """What the composition logs, and what its components report."""
        # A micro-batch's contribution times their number averages to the loss itself.
        scale = batch.denominators.micro_batches
        own = {}
        for name, contribution in contributions.items():
            own[f"{name}_loss"] = contribution.detach() * scale
            weight = weights[name]
            own[f"{name}_weight"] = weight if isinstance(weight, Tensor) else contribution.detach().new_full((), weight)
        own["total_loss"] = total.detach() * scale
        return own | merge_metrics(reported, taken=own)

    def extra_repr(self) -> str:
        weights = {name: self.weight_schedules.get(name, weight) for name, weight in self.weights.items()}
        return f"weights={weights}" + ("" if self.balancer is None else f", balancing={self.balancer.extra_repr()}")


def _by_name(components: Mapping[str, Loss] | Sequence[Loss]) -> dict[str, Loss]:
    if isinstance(components, Mapping):
        return dict(components)
    names = [getattr(loss, "name", "") or LossFunctionRegistry.name_of(type(loss)) for loss in components]
    check_distinct(names)
    return dict(zip(names, components, strict=True))


def check_distinct(names: Sequence[str]) -> None:
    """Refuse two components of one name."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise LossConfigError(f"components share the name {repeated[0]!r}: give each its own 'name'")


def _weights_by_name(
    weights: Mapping[str, Weight] | Sequence[Weight] | None, components: Mapping[str, Loss]
) -> dict[str, Weight]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        if len(weights) != len(components):
            raise LossConfigError(f"there are {len(components)} components and {len(weights)} weights")
        return dict(zip(components, weights, strict=True))
    for name in weights:
        if name not in components:
            raise LossConfigError(f"there is a weight for {name!r}, but the components are {', '.join(components)}")
    return dict(weights)


def build_component(config: Any, context: BuildContext, where: str) -> Loss:
    """Build one component from a name or a dict with `type`, or take a loss object; `where` begins messages."""
    if isinstance(config, Loss):
        return config
    if isinstance(config, str):
        config = {"type": config}
    if not isinstance(config, Mapping) or not isinstance(config.get("type"), str):
        raise LossConfigError(f"{where}: expected a loss's name or a dict with 'type', found {config!r}")
    with named(where):
        return LossFunctionRegistry.build(config, context=context)


def merge_metrics(reported: Mapping[str, Metrics], taken: Collection[str] = ()) -> dict[str, Any]:
    """Metrics of all components; a name that several report, or that is taken, is prefixed with the component's."""
    times = Counter(key for metrics in reported.values() for key in metrics)
    times.update(list(taken))  # of a mapping, a counter would add the values
    return {
        key if times[key] == 1 else f"{component}/{key}": value
        for component, metrics in reported.items()
        for key, value in metrics.items()
    }


__all__ = ["ComposableLossFunction", "LossOfLosses", "build_component", "check_distinct", "merge_metrics"]
