"""A preference loss with auxiliary objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...base import Loss
from ...composition import ComposableLossFunction, build_component, check_distinct
from ...errors import LossConfigError
from ...hyperparameters import suggestion
from ...registry import BuildContext, LossFunctionRegistry

_MAIN = "main_dpo"
_PREFIX = "auxiliary_"


@LossFunctionRegistry.register("multi_objective_dpo")
class MultiObjectiveDPOLoss(ComposableLossFunction):
    """DPO, or another preference loss, plus weighted auxiliary objectives on the same forward pass.

    loss = main_dpo + sum_k weight_k auxiliary_k

    Each is reduced as it declares. Logs `main_dpo_loss`, `auxiliary_<name>_loss` (before its weight),
    `auxiliary_<name>_weight` and `total_loss`, and the auxiliaries' own metrics.

    In the tutorial's code two of the three auxiliaries are constants 0, the third counts prompts and padding, and the
    sum overwrites the main loss before it is logged.

    Args:
        auxiliary_losses: Name -> hyperparameters, or a list of names. A name is that of a preference loss
            (`perplexity`, `consistency`, `safety`, ...); with `{type: <loss>, ...}` it is free.
        auxiliary_weights: Name -> weight, a number or a schedule; 1 where left out. The main loss has weight 1.
        base: The main loss, a name or `{type, **hyperparameters}`.
        balancing: Gradient balancing (see `ComposableLossFunction`).

    Errors: A weight for no auxiliary loss, a loss of the policy family.

    Source: After NeMo RL's tutorial on custom losses; its parts state theirs.
    """

    family = "preference"
    example = {"auxiliary_losses": {"perplexity": {}, "safety": {}}, "auxiliary_weights": {"perplexity": 0.3}}

    def __init__(
        self,
        *,
        auxiliary_losses: dict | list,
        auxiliary_weights: dict | None = None,
        base: str | dict | Loss = "sigmoid",
        balancing: str | dict | None = None,
    ) -> None:
        losses = _built(base, auxiliary_losses, BuildContext(family="preference"))
        super().__init__(losses, _prefixed_weights(auxiliary_weights or {}, losses), balancing=balancing)

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> MultiObjectiveDPOLoss:
        """Build the main loss and the auxiliaries, whose left-out hyperparameters fall back to the trainer's config."""
        losses = _built(values["base"], values["auxiliary_losses"], replace(context, family="preference"))
        main = losses.pop(_MAIN)
        auxiliary = {name.removeprefix(_PREFIX): loss for name, loss in losses.items()}
        return cls(**{**values, "base": main, "auxiliary_losses": auxiliary})


def _built(base: Any, auxiliary_losses: Mapping[str, Any] | list, context: BuildContext) -> dict[str, Loss]:
    """The components by name; losses that are objects already stay as they are."""
    if not isinstance(auxiliary_losses, Mapping):
        if not all(isinstance(name, str) for name in auxiliary_losses):
            raise LossConfigError(
                "'auxiliary_losses': expected a list of names, or a dict name -> hyperparameters, found "
                f"{auxiliary_losses!r}"
            )
        check_distinct(auxiliary_losses)
        auxiliary_losses = dict.fromkeys(auxiliary_losses)
    losses = {_MAIN: _component(base, context, "'base'")}
    for name, settings in auxiliary_losses.items():
        where = f"'auxiliary_losses', {name!r}"
        if settings is None or isinstance(settings, Mapping):  # YAML writes "no hyperparameters" as null
            settings = {"type": name, **(settings or {})}
        elif not isinstance(settings, Loss):
            raise LossConfigError(f"{where}: expected a dict of hyperparameters, found {settings!r}")
        losses[f"{_PREFIX}{name}"] = _component(settings, context, where)
    return losses


def _component(config: Any, context: BuildContext, where: str) -> Loss:
    if isinstance(config, Loss):
        return LossFunctionRegistry.build(config, context=context)
    return build_component(config, context, where)


def _prefixed_weights(weights: Mapping[str, Any], losses: Mapping[str, Loss]) -> dict[str, Any]:
    known = [name.removeprefix(_PREFIX) for name in losses if name != _MAIN]
    for name in weights:
        if name not in known:
            raise LossConfigError(
                f"'auxiliary_weights': there is no auxiliary loss {name!r}{suggestion(str(name), known)}; there are "
                f"{', '.join(known) or 'none'}"
            )
    return {f"{_PREFIX}{name}": weight for name, weight in weights.items()}
