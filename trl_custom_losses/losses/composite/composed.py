"""Weighted sums of losses of one family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base import Loss
from ...composition import ComposableLossFunction, build_component, check_distinct
from ...errors import LossConfigError, named
from ...registry import BuildContext, LossFunctionRegistry
from ...schedules import Schedule


@LossFunctionRegistry.register("composed")
class ComposedLoss(ComposableLossFunction):
    """Weighted sum of losses on one forward pass; each is reduced as it declares.

    loss = sum_k weight_k * reduce_k(loss_k)

    Logs `<component>_loss` (before its weight), `<component>_weight` and `total_loss`. A metric that one component
    reports keeps its name; one that several report is logged for each as `<component>/<metric>`.

    Args:
        components: Each `{type, name, weight, **hyperparameters}`, or (name, weight, loss object); `name` defaults to
            the type and must be unique, `weight` (a number or a schedule) defaults to 1.
        balancing: Gradient balancing (see `ComposableLossFunction`).

    Errors: No component, two of the same name, or components of different families.

    Source: DPO's `loss_type` lists with `loss_weights` are this sum (Wang et al. 2024, arXiv:2411.10442).
    """

    example = {"components": [{"type": "sigmoid", "weight": 1.0}, {"type": "sft", "weight": 0.2}]}

    def __init__(self, *, components: list, balancing: str | dict | None = None) -> None:
        if not components:
            raise LossConfigError("'components' must list at least one loss")
        names, weights, losses = zip(*_parsed(components, BuildContext()), strict=True)
        check_distinct(names)
        super().__init__(dict(zip(names, losses, strict=True)), weights, balancing=balancing)

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> ComposedLoss:
        """Build the components; see the class for what `values["components"]` holds."""
        return cls(**{**values, "components": _parsed(values["components"], context)})


def _parsed(components: list, context: BuildContext) -> list[tuple[str, float | Schedule, Loss]]:
    return [parse_component(component, context, number) for number, component in enumerate(components, start=1)]


def parse_component(component: Any, context: BuildContext, number: int) -> tuple[str, float | Schedule, Loss]:
    """Build `(name, weight, loss)` from an entry of `components`.

    Raises:
        LossConfigError: The entry is malformed; the message begins with its number.
    """
    where = f"component {number}"
    if isinstance(component, Loss):
        return component.name or type(component).__name__, 1.0, component
    if isinstance(component, (tuple, list)) and len(component) == 3 and isinstance(component[2], Loss):
        return tuple(component)
    if not isinstance(component, Mapping) or not isinstance(component.get("type"), str):
        raise LossConfigError(f"{where}: expected a dict with 'type', found {component!r}")
    settings = dict(component)
    name = settings.pop("name", settings["type"].replace(":", ".").rsplit(".", 1)[-1])
    weight = settings.pop("weight", 1.0)
    if not isinstance(name, str):
        raise LossConfigError(f"{where}: 'name' must be text without dots, found {name!r}")
    with named(where):
        declared = LossFunctionRegistry.find(settings["type"], context.family).declared_hyperparameters()
    for key in ("name", "weight"):
        if key in declared:
            raise LossConfigError(
                f"{where}: '{key}' is a key of the component, but also a hyperparameter of '{settings['type']}'; "
                "rename the hyperparameter"
            )
    return name, weight, build_component(settings, context, where)
