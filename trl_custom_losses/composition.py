"""Weighted sums of losses of one family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .base import Loss, Metrics
from .errors import LossConfigError
from .hyperparameters import check_type
from .reductions import evaluate, reduce_loss
from .registry import BuildContext, LossFunctionRegistry
from .types import ModelOutputs, PolicyBatch, PreferenceBatch, Rollout, TokenReduction

#: `<name>_loss` is logged for something else.
_TAKEN_NAMES = ("total", "policy", "aux", "train", "eval")


@LossFunctionRegistry.register("composed")
class ComposedLoss(Loss):
    """Weighted sum of losses on one forward pass; each is reduced as it declares.

    loss = sum_k weight_k * reduce_k(loss_k)

    Logs `<component>_loss` (before its weight), `<component>_weight` and `total_loss`. A metric that one component
    reports keeps its name; one that several report is logged for each as `<component>/<metric>`.

    Args:
        components: Each `{type, name, weight, **hyperparameters}`; `name` defaults to the type and must be unique,
            `weight` defaults to 1.

    Errors: No component, two of the same name, or components of different families.

    Source: DPO's `loss_type` lists with `loss_weights` are this sum (Wang et al. 2024, arXiv:2411.10442).
    """

    composite = True

    def __init__(self, *, components: list) -> None:
        super().__init__()
        names, weights, losses = zip(*components, strict=True)
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise LossConfigError(f"components share the name {repeated[0]!r}: give each its own 'name'")
        taken = [name for name in names if name in _TAKEN_NAMES]
        if taken:
            raise LossConfigError(
                f"the metric '{taken[0]}_loss' is the trainer's; choose another component name than {taken[0]!r}"
            )
        for name, loss in zip(names, losses, strict=True):
            loss.name = loss.name or name
        # Not a ModuleDict, which refuses names such as "type" or "train".
        self.losses = nn.ModuleList(losses)
        self.names: tuple[str, ...] = names
        self.weights: dict[str, float] = dict(zip(names, weights, strict=True))
        self.family = losses[0].family
        self.requires = frozenset().union(*(loss.requires for loss in losses))
        self.columns = tuple(dict.fromkeys(column for loss in losses for column in loss.columns))
        self.batch_coupled = any(loss.batch_coupled for loss in losses)

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> ComposedLoss:
        """Build the components; see the class for what `values["components"]` holds."""
        components = values["components"]
        if not components:
            raise LossConfigError("'components' must list at least one loss")
        return cls(components=build_components(components, context))

    def components(self) -> Iterator[tuple[str, Loss]]:
        """The components by name."""
        return zip(self.names, self.losses, strict=True)

    def leaves(self) -> list[Loss]:
        return [leaf for loss in self.losses for leaf in loss.leaves()]

    @property
    def kl_reduction(self) -> str | TokenReduction:
        leaves = self.leaves()
        return next((leaf for leaf in leaves if leaf.surrogate), leaves[0]).kl_reduction

    @property
    def prepares(self) -> bool:
        """Whether any component prepares a rollout."""
        return any(loss.prepares for loss in self.losses)

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        """Let each component that wants to prepare the rollout do so, under its own names."""
        prepared: dict[str, Tensor] = {}
        for name, loss in self.components():
            if loss.prepares:
                prepared |= rollout.scoped_result(name, loss.prepare(rollout))
        return prepared

    def forward(self, batch: PreferenceBatch | PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        contributions: dict[str, Tensor] = {}
        reported: dict[str, Metrics] = {}
        for name, loss in self.components():
            scoped = batch.scoped(name)
            raw, reported[name] = evaluate(loss, scoped, model_outputs)
            contributions[name] = reduce_loss(loss, raw, scoped)
        total = sum(self.weights[name] * contribution for name, contribution in contributions.items())
        # A micro-batch's contribution times their number averages to the loss itself.
        scale = batch.denominators.micro_batches
        own = {}
        for name, contribution in contributions.items():
            own[f"{name}_loss"] = contribution.detach() * scale
            own[f"{name}_weight"] = contribution.new_full((), self.weights[name])
        own["total_loss"] = total.detach() * scale
        return total, own | merge_metrics(reported, taken=own)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def build_components(components: Sequence[Mapping[str, Any]], context: BuildContext) -> list[tuple[str, float, Loss]]:
    """Build `(name, weight, loss)` for each component of a composition, all of one family.

    Raises:
        LossConfigError: A component is malformed, two share a name, or their families differ.
    """
    built: list[tuple[str, float, Loss]] = []
    for index, component in enumerate(components):
        where = f"component {index + 1}"
        if not isinstance(component, Mapping) or not isinstance(component.get("type"), str):
            raise LossConfigError(f"{where}: expected a dict with 'type', found {component!r}")
        settings = dict(component)
        name = settings.pop("name", settings["type"].replace(":", ".").rsplit(".", 1)[-1])
        weight = settings.pop("weight", 1.0)
        if not isinstance(name, str) or not name or "." in name:
            raise LossConfigError(f"{where}: 'name' must be text without dots, found {name!r}")
        weight = check_type(weight, float, f"{where} ('{name}'), 'weight'")
        for key in ("name", "weight"):
            if key in LossFunctionRegistry.find(settings["type"], context.family).declared_hyperparameters():
                raise LossConfigError(
                    f"{where}: '{key}' is a key of the component, but also a hyperparameter of '{settings['type']}'; "
                    "rename the hyperparameter"
                )
        loss = LossFunctionRegistry.build(settings, context=context)
        built.append((name, weight, loss))
    families = sorted({str(loss.family) for _, _, loss in built})
    if len(families) > 1:
        raise LossConfigError(f"components are of one family, found {' and '.join(families)}")
    return built


def merge_metrics(reported: Mapping[str, Metrics], taken: Collection[str] = ()) -> dict[str, Any]:
    """Metrics of all components; a name that several report, or that is taken, is prefixed with the component's."""
    times = Counter(key for metrics in reported.values() for key in metrics)
    times.update(taken)
    return {
        key if times[key] == 1 else f"{component}/{key}": value
        for component, metrics in reported.items()
        for key, value in metrics.items()
    }


__all__ = ["ComposedLoss", "build_components", "merge_metrics"]
