"""A preference loss whose beta moves during training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from ...base import Loss, Metrics, PreferenceLoss
from ...errors import LossConfigError
from ...hyperparameters import check_choice, check_range
from ...reductions import evaluate
from ...registry import BuildContext, LossFunctionRegistry
from ...schedules import Linear
from ...scheduling import put_schedules
from ...types import ModelOutputs, PreferenceBatch
from .beta_strategies import STRATEGIES, check_strategy
from .wrapped_base import build_base, check_base

Strategy = Literal["schedule", "margin", "kl"]
Lag = Literal[0, 1]

# What the wrapped loss declares about itself and is true of both.
_FACTS = (
    "columns",
    "column_scorers",
    "reduction",
    "batch_coupled",
    "minimum_batch",
    "pair_weighting",
    "f_divergence",
)


@LossFunctionRegistry.register("adaptive_dpo")
class AdaptiveDPOLoss(PreferenceLoss):
    """A preference loss, DPO by default, whose beta moves: on a schedule, with the margins, or with the distance from
    the reference.

    schedule: beta_t = final + (beta - final) t / W while t < W
    then: beta_t = final + (beta - final) (1 + cos(pi min((t - W) / D, 1))) / 2
    margin: beta_t = max(beta (1 + a (M - M0)), 0.001),  M = mean of log_ratio_chosen - log_ratio_rejected
    kl: beta_t = beta_(t-1) (1 + clip(KL / target_kl - 1, -0.2, 0.2) n / horizon)

    Everything but beta is left to the wrapped loss. Beta moves once per optimizer step and in training only, is the
    same on all ranks, and is saved with checkpoints. Logs `adaptive_beta`, and `adaptive_margin` or `adaptive_kl`, the
    M or KL that it follows; one that is not finite leaves beta as it is. What M, M0 and KL are exactly, and are not, is
    told by `MarginFollowing` and `KLControlled` in `beta_strategies`.

    The schedule rises from `final_beta` to `beta` in the first W = `warmup_steps` optimizer steps, falls back over the
    next D = `decay_steps`, and stays; it is continuous. In the tutorial that the loss comes from, the warm-up leads
    from beta down to the final value and beta then jumps back up; steps are micro-batches; the cosine is taken of a
    float by torch, which fails; and beta would rise again 10,000 steps after the warm-up.

    Args:
        base: The wrapped loss, which must have a `beta`: its name, or a dict with `type` and hyperparameters.
        beta: Initial beta, > 0, per nat; its other name is `reference_policy_kl_penalty`. It takes no schedule.
        strategy: "schedule", "margin" or "kl". What belongs to another strategy than the chosen one is an error.
        final_beta: Schedule: beta at both ends, > 0; None takes a tenth of `beta`.
        warmup_steps: Schedule: W, >= 0.
        decay_steps: Schedule: D, >= 1; None takes what is left of the run.
        margin_scale: Margin: a, per nat, >= 0.
        margin_decay: Margin: decay of the running mean M0, 0 <= margin_decay < 1.
        lag: Margin: 1 follows the previous step's batch, 0 the micro-batch at hand, which couples its pairs.
        target_kl: KL: nats per completion, > 0.
        horizon: KL: completions, > 0; beta moves the faster, the smaller it is.

    Errors: A base without beta, one that would not follow it, or one that is made of losses.

    Source: Wu et al. 2024, arXiv:2407.08639 (margin); Ziegler et al. 2019, arXiv:1909.08593 (kl).
    """

    aliases = {"reference_policy_kl_penalty": "beta"}

    def __init__(
        self,
        *,
        base: Loss | str | dict = "sigmoid",
        beta: float = 0.1,
        strategy: Strategy = "schedule",
        final_beta: float | None = None,
        warmup_steps: int = 1000,
        decay_steps: int | None = None,
        margin_scale: float = 0.6,
        margin_decay: float = 0.9,
        lag: Lag = 1,
        target_kl: float | None = None,
        horizon: int = 10_000,
    ) -> None:
        super().__init__()
        self.initial_beta = check_range("beta", beta, above=0)
        self.strategy = check_choice("strategy", strategy, Strategy)
        self.final_beta = None if final_beta is None else check_range("final_beta", final_beta, above=0)
        self.warmup_steps = check_range("warmup_steps", warmup_steps, at_least=0)
        self.decay_steps = None if decay_steps is None else check_range("decay_steps", decay_steps, at_least=1)
        self.margin_scale = check_range("margin_scale", margin_scale, at_least=0)
        self.margin_decay = check_range("margin_decay", margin_decay, at_least=0, below=1)
        self.lag = check_choice("lag", lag, Lag)
        self.target_kl = None if target_kl is None else check_range("target_kl", target_kl, above=0)
        self.horizon = check_range("horizon", horizon, above=0)
        check_strategy(self)
        self.mover = STRATEGIES[strategy]()
        self.base = base if isinstance(base, Loss) else build_base(base, beta, BuildContext(family="preference"))
        check_base(self.base)
        self.base.owner_of("beta").beta = self.initial_beta
        for fact in _FACTS:
            setattr(self, fact, getattr(self.base, fact))
        self.requires = frozenset(self.base.requires) | self.mover.requires
        self.batch_coupled = self.batch_coupled or self._follows_the_batch
        self.run_steps: int | None = None
        self._beta_of_step: float | None = None

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> AdaptiveDPOLoss:
        """Build the wrapped loss too, and see that it takes the lowest beta and would follow."""
        if isinstance(values["base"], Loss):
            return cls(**values)
        context = context if context.family else BuildContext(family="preference")
        base = build_base(values["base"], values["beta"], context)
        loss, own = cls(**{**values, "base": base}), base.schedules

        def rebuild(changed: dict[str, Any]) -> Loss:
            other = build_base(values["base"], changed["beta"], context)
            other.schedules = own
            return other

        # For the checks on the way: nothing in the base may be computed from beta once and for all.
        put_schedules(base, {"beta": Linear(start=loss.initial_beta, end=loss.mover.lowest(loss))}, rebuild)
        base.schedules = own
        base.origins = {**base.origins, "beta": "adaptive_dpo"}
        return loss

    def components(self) -> Iterator[tuple[str, Loss]]:
        """The wrapped loss, so that it takes part in the run."""
        return iter((("base", self.base),))

    def leaves(self) -> list[Loss]:
        """This loss alone: it stands for the wrapped one, whose beta and declarations it has."""
        return [self]

    # Beta

    @property
    def beta(self) -> float | Tensor:
        """The wrapped loss's beta: that of the step under way, or of the last one."""
        return self.base.owner_of("beta").beta

    @beta.setter
    def beta(self, value: Any) -> None:
        raise LossConfigError(
            "'beta' is where adaptive_dpo starts from: give it a number; for a schedule of your own, use the base alone"
        )

    @property
    def _follows_the_batch(self) -> bool:
        return self.strategy == "margin" and self.lag == 0

    def hyperparameters(self) -> dict[str, Any]:
        given = {"beta": self.initial_beta} if "beta" in self.origins else {}
        return super().hyperparameters() | given

    def on_train_begin(self, total_steps: int) -> None:
        self.run_steps = total_steps
        if self.strategy == "schedule" and self.warmup_steps >= total_steps:
            warnings.warn(
                f"adaptive_dpo: the warm-up of {self.warmup_steps} steps is not over when the run ends after "
                f"{total_steps}, so beta does not reach {self.initial_beta:g}; set 'warmup_steps'",
                stacklevel=2,
            )

    def move_to_step(self, step: int) -> None:
        super().move_to_step(step)
        self._beta_of_step = self.mover.begin_step(self, step)

    def on_step_begin(self, step: int) -> None:
        self._beta_of_step = self.mover.begin_step(self, step)  # again, for what another hook has set

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> Mapping[str, float] | None:
        return self.mover.end_step(self, *observed["followed"].tolist()) if "followed" in observed else None

    @property
    def observes(self) -> bool:
        """Whether the strategy follows the training, or a subclass hears of a step's end."""
        return self.strategy != "schedule" or type(self).on_step_end is not AdaptiveDPOLoss.on_step_end

    # The loss

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        followed = self.mover.followed(batch, model_outputs)
        if followed is not None:
            self.observe("followed", followed)
        beta = self.initial_beta if self._beta_of_step is None else self._beta_of_step
        if self._follows_the_batch and self.training:
            beta = self.mover.beta_of_batch(self, followed, batch.ranks)
        self.base.owner_of("beta").beta = beta
        raw, metrics = evaluate(self.base, batch, model_outputs)
        return raw, {**metrics, "adaptive_beta": raw.new_full((), beta) if isinstance(beta, float) else beta}
