"""The loss that `adaptive_dpo` wraps: made, and checked that its beta can move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base import Loss
from ...composition import build_component
from ...errors import LossConfigError, named
from ...registry import GIVEN_OBJECT, BuildContext, LossFunctionRegistry


def build_base(config: Any, beta: float, context: BuildContext) -> Loss:
    """Build the wrapped loss from a name or a dict with `type`, with `beta`."""
    settings = dict(config) if isinstance(config, Mapping) else {"type": config}
    if isinstance(settings.get("type"), str):
        with named("'base'"):
            loss_class = LossFunctionRegistry.find(settings["type"], context.family)
        given = [key for key in settings if loss_class.aliases.get(key, key) == "beta"]
        if given:
            raise LossConfigError(f"'base': adaptive_dpo sets its beta; move '{given[0]}' out of 'base'")
        if not _has_beta(loss_class):
            raise _without_beta(settings["type"])
        settings["beta"] = beta
    return build_component(settings, context, "'base'")


def check_base(base: Loss) -> None:
    """Refuse a wrapped loss whose beta cannot be moved."""
    if base.composite or list(base.components()):
        raise LossConfigError(
            f"'base' is a single loss, found '{base.name}', which is made of losses: put adaptive_dpo inside of it"
        )
    if base.family != "preference":
        raise LossConfigError(f"'base' is a preference loss, found '{base.name}', a {base.family} loss")
    if not hasattr(base.owner_of("beta"), "beta"):
        raise _without_beta(base.name or type(base).__name__)
    if "beta" in base.schedules:
        raise LossConfigError(f"'base': the beta of '{base.name}' is on a schedule, but adaptive_dpo sets it")
    base.origins = base.origins or dict.fromkeys(base.declared_hyperparameters(), GIVEN_OBJECT)


def _has_beta(loss_class: type[Loss]) -> bool:
    return "beta" in loss_class.declared_hyperparameters() and not loss_class.composite


def _without_beta(name: str) -> LossConfigError:
    classes = {other: LossFunctionRegistry.get(other) for other in LossFunctionRegistry.names("preference")}
    having = [other for other, found in classes.items() if _has_beta(found) and other != "adaptive_dpo"]
    return LossConfigError(f"'base': '{name}' has no beta that could move; these have one: {', '.join(having)}")
