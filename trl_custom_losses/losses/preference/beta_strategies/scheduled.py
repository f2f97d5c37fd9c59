"""Beta on a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....schedules import WarmupCosine
from .strategy import BetaStrategy

if TYPE_CHECKING:
    from ..adaptive_dpo import AdaptiveDPOLoss


class Scheduled(BetaStrategy):
    """Linear from the final to the initial beta over the warm-up, then along half a cosine back to the final one."""

    reads = ("final_beta", "warmup_steps", "decay_steps")

    def lowest(self, loss: AdaptiveDPOLoss) -> float:
        return 0.1 * loss.initial_beta if loss.final_beta is None else loss.final_beta

    def begin_step(self, loss: AdaptiveDPOLoss, step: int) -> float:
        final, warmup = self.lowest(loss), loss.warmup_steps
        total = None if loss.decay_steps is None else warmup + loss.decay_steps
        curve = WarmupCosine(start=final, peak=loss.initial_beta, end=final, warmup_steps=warmup, total_steps=total)
        if loss.run_steps is not None:
            curve.begin(loss.run_steps)
        return curve.value(step)
