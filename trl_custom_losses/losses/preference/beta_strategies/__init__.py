"""How beta moves during training: the strategies of `adaptive_dpo`, one a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....errors import LossConfigError
from .kl import KLControlled
from .margin import MarginFollowing
from .scheduled import Scheduled
from .strategy import LOWEST_BETA, BetaStrategy

if TYPE_CHECKING:
    from ..adaptive_dpo import AdaptiveDPOLoss

STRATEGIES: dict[str, type[BetaStrategy]] = {"schedule": Scheduled, "margin": MarginFollowing, "kl": KLControlled}


def check_strategy(loss: AdaptiveDPOLoss) -> None:
    """Refuse what the chosen strategy cannot work with, and what only another one reads.

    Raises:
        LossConfigError: `target_kl` is missing, `beta` is below the floor, or a hyperparameter has no effect.
    """
    declared = loss.declared_hyperparameters()
    for name, other in STRATEGIES.items():
        given = [key for key in other.reads if getattr(loss, key) != declared[key].default]
        if given and name != loss.strategy:
            raise LossConfigError(
                f"'{given[0]}' belongs to the strategy '{name}' and has no effect with '{loss.strategy}': leave it "
                f"out, or set `strategy: {name}`"
            )
    if loss.strategy == "kl" and loss.target_kl is None:
        raise LossConfigError("strategy 'kl' needs the hyperparameter 'target_kl', in nats per completion")
    if loss.strategy != "schedule" and loss.initial_beta < LOWEST_BETA:
        raise LossConfigError(
            f"strategy '{loss.strategy}' holds beta at {LOWEST_BETA:g} or above: expected at least that for 'beta', "
            f"found {loss.initial_beta!r}"
        )


__all__ = ["STRATEGIES", "check_strategy"]
