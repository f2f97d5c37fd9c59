"""A preference loss and a policy loss on the same rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base import Loss
from ...composition import ComposableLossFunction
from ...errors import named
from ...registry import BuildContext, LossFunctionRegistry


@LossFunctionRegistry.register("composed_dpo_grpo")
class ComposedDPOGRPOLoss(ComposableLossFunction):
    """DPO on the best against the worst completion of each prompt, beside GRPO on all of them.

    loss = dpo_weight * rollout_pairs(dpo) + grpo_weight * grpo

    The preference loss sees pairs made from the rollout, as `rollout_pairs` makes them; one forward pass serves both
    sides. GRPO's part of the trainer's config (`epsilon`, `scale_rewards`, ...) is the default of the `grpo` side
    alone: its `beta` is a KL coefficient and never the beta of `dpo`. The KL term itself, if `beta` is not 0, the
    trainer adds once, around the sum.

    Logs `dpo_loss`, `grpo_loss` (before their weights), `dpo_weight`, `grpo_weight`, `total_loss`, and what the two
    sides log.

    Args:
        dpo: The preference loss, a name or a dict with `type` (see `rollout_pairs`).
        grpo: The policy loss, a name or a dict with `type`.
        dpo_weight: Weight of the preference loss, a number or a schedule.
        grpo_weight: Weight of the policy loss, a number or a schedule.
        balancing: Gradient balancing of the two (see `ComposableLossFunction`).

    Errors: `dpo` is no preference loss or one that `rollout_pairs` refuses; `grpo` is no policy loss.

    Source: the sum of Rafailov et al. 2023, arXiv:2305.18290, and Shao et al. 2024, arXiv:2402.03300, on one rollout;
    pairs as in Yuan et al. 2024, arXiv:2401.10020.
    """

    family = "policy"

    def __init__(
        self,
        *,
        dpo: str | dict | Loss = "adaptive_dpo",
        grpo: str | dict | Loss = "dynamic_grpo",
        dpo_weight: float = 0.7,
        grpo_weight: float = 0.3,
        balancing: str | dict | None = None,
    ) -> None:
        sides = {
            "dpo": _side("dpo", {"type": "rollout_pairs", "base": dpo}, BuildContext(family="policy")),
            "grpo": _side("grpo", grpo, BuildContext(family="policy")),
        }
        super().__init__(sides, {"dpo": dpo_weight, "grpo": grpo_weight}, balancing=balancing)

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> ComposedDPOGRPOLoss:
        """Build the `grpo` side with the trainer's config behind it."""
        return cls(**{**values, "grpo": _side("grpo", values["grpo"], context)})

    # The registry moves scheduled hyperparameters by their names.

    @property
    def dpo_weight(self) -> float:
        """Weight of the preference loss now."""
        return self.weights["dpo"]

    @dpo_weight.setter
    def dpo_weight(self, value: float) -> None:
        self.weights["dpo"] = value

    @property
    def grpo_weight(self) -> float:
        """Weight of the policy loss now."""
        return self.weights["grpo"]

    @grpo_weight.setter
    def grpo_weight(self, value: float) -> None:
        self.weights["grpo"] = value

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{name}={schedule}" for name, schedule in self.schedules.items())])


def _side(name: str, config: str | dict | Loss, context: BuildContext) -> Loss:
    with named(f"'{name}'"):
        return LossFunctionRegistry.build(config, context=context)
