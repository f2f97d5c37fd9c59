"""A policy loss with diversity and quality objectives."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from ...base import Loss
from ...composition import ComposableLossFunction, build_component
from ...errors import LossConfigError
from ...hyperparameters import check_type
from ...registry import BuildContext, LossFunctionRegistry
from ...schedules import Schedule, as_schedule, is_schedule
from ..auxiliary.diversity import DiversityLoss
from ..auxiliary.quality import QualityLoss

# Not `float`: the registry would follow a schedule itself and hand over a number, which may be 0 at first, but the
# composition follows it, and keeps the component.
_Weight = Real | dict | Schedule

_AUXILIARY: dict[str, type[Loss]] = {"diversity": DiversityLoss, "quality": QualityLoss}


@LossFunctionRegistry.register("multi_objective_grpo")
class MultiObjectiveGRPOLoss(ComposableLossFunction):
    """GRPO, or another surrogate, plus weighted diversity and quality of the completions' states.

    loss = main_grpo + diversity_weight * diversity + quality_weight * quality

    Each is reduced as it declares; see `diversity` and `quality`. Logs `main_grpo_loss`, `diversity_loss` and
    `quality_loss` (before their weights), `diversity_weight`, `quality_weight` and `total_loss`, and the metrics of the
    main loss. An objective whose weight is the number 0 is left out, with all that it needs and logs.

    Deviates from the tutorial, whose distances are unbounded, whose nearest responses may answer other prompts, and
    which takes zeros for the targets of a data set without any.

    Args:
        base: The main loss, a name or `{type, **hyperparameters}`; a surrogate, or a composition with one.
        diversity_weight, quality_weight: Numbers or schedules.
        balancing: Gradient balancing (see `ComposableLossFunction`).

    Errors: A main loss without a surrogate; a data set without the column `target`, unless `quality_weight` is 0.

    Source: After NeMo RL's tutorial on custom losses; its parts state theirs.
    """

    family = "policy"

    def __init__(
        self,
        *,
        base: str | dict | Loss = "grpo",
        diversity_weight: _Weight = 0.1,
        quality_weight: _Weight = 0.1,
        balancing: str | dict | None = None,
    ) -> None:
        main = _main(base, BuildContext(family="policy"))
        given = {"diversity": diversity_weight, "quality": quality_weight}
        checked = {name: _checked(weight, f"'{name}_weight'") for name, weight in given.items()}
        weights = {name: weight for name, weight in checked.items() if weight != 0}
        components = {"main_grpo": main} | {name: _AUXILIARY[name]() for name in weights}
        super().__init__(components, weights, balancing=balancing)

    @property
    def diversity_weight(self) -> float:
        """Weight of the diversity objective now, before balancing."""
        return self.weights.get("diversity", 0.0)

    @property
    def quality_weight(self) -> float:
        """Weight of the quality objective now, before balancing."""
        return self.weights.get("quality", 0.0)

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> MultiObjectiveGRPOLoss:
        """Build the main loss, whose left-out hyperparameters fall back to the trainer's config."""
        return cls(**{**values, "base": _main(values["base"], context)})


def _checked(weight: Any, where: str) -> float | Schedule:
    return as_schedule(weight, float, where) if is_schedule(weight) else check_type(weight, float, where)


def _main(base: str | dict | Loss, context: BuildContext) -> Loss:
    """The main loss; one that is an object already stays as it is."""
    main = build_component(base, context, "'base'")
    if not any(leaf.surrogate for leaf in main.leaves()):
        raise LossConfigError(f"'base': expected a policy surrogate such as 'grpo' or 'dapo', found {main.name!r}")
    return main
