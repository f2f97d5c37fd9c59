"""Weighted sums whose weights move with the objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...balancing.gramian import watch_parts
from ...balancing.rules import RULES, UncertaintyWeights
from ...balancing.signals import SIGNALS, measure
from ...base import Loss, Metrics
from ...composition import Batch, ComposableLossFunction, build_component
from ...errors import LossConfigError
from ...hyperparameters import Hyperparameter, check_type, hyperparameters_of, suggestion
from ...registry import BuildContext, LossFunctionRegistry
from ...types import ModelOutputs

#: Of a rule's constructor, what it gets from the composition.
_FROM_COMPOSITION = ("names", "initial_weights")


@LossFunctionRegistry.register("dynamic_multi_objective")
class DynamicMultiObjectiveLoss(ComposableLossFunction):
    """Weighted sum of objectives whose weights follow how the objectives develop, by one of several rules.

    loss = sum_k weight_k(t) loss_k,  weight(t + 1) = rule(losses or signals up to step t)

    The rules: `trend` (raise what falls, lower what does not), `dwa` (dynamic weight averaging), `softadapt`,
    `relobralo`, `constraint` (nuPI controller that holds objectives at targets) and `uncertainty` (learned with the
    model). They are fed once per optimizer step, in training only, with means over all micro-batches and ranks; so
    weights are the same on every rank, and do not depend on how a batch is split. Their state is saved with
    checkpoints. Logs `<name>_loss`, `<name>_weight` and `total_loss`.

    The tutorial's code moves its weights at every micro-batch from this rank's values, keeps whole histories, and logs
    the weights as a dict; this does not.

    Args:
        objectives: Name -> loss (a name, or `{type, **hyperparameters}`), all of one family.
        initial_weights: Name -> weight before the rule acts; 1 where left out.
        rule: The rule's name, or `{type, **options}`. Options may also stand beside it: `adaptation_rate` (0.01) of
            `trend`, `temperature` of `dwa`, `targets` of `constraint`, ... (see `balancing.rules`).
        signal: What the rule follows in place of the losses, for all objectives or by name: "kl" (nats per token),
            "entropy", "length" (tokens), "margin", "reward", or the name of a metric that an objective reports. The
            loss of an on-policy surrogate is about 0 by construction and says nothing.
        balancing: Gradient balancing of the weighted objectives (see `ComposableLossFunction`).

    Errors: An unknown rule or option, options of another rule, a weight for no objective, or `balancing` or a signal
    together with `uncertainty`, which learns its weights from the losses. A signal that names a metric which nothing
    reports shows in the first forward pass, with the metrics that there are.

    Source: trend, the source tutorial; arXiv:1803.10704 (DWA), arXiv:1912.12355 (SoftAdapt), arXiv:2110.09813
    (ReLoBRaLo), arXiv:1705.07115 (uncertainty), arXiv:2406.04558 (nuPI).
    """

    example = {"objectives": {"main": {"type": "sigmoid"}, "fluency": {"type": "sft"}}}

    def __init__(
        self,
        *,
        objectives: Mapping[str, Loss],
        initial_weights: Mapping[str, float] | None = None,
        rule: str | dict = "trend",
        signal: str | dict | None = None,
        balancing: str | dict | None = None,
        **options: Any,
    ) -> None:
        super().__init__(objectives, initial_weights, balancing=balancing)
        if self.weight_schedules:
            raise LossConfigError(
                f"'initial_weights': the rule moves the weights, so they cannot follow a schedule too; found "
                f"{self.weight_schedules}"
            )
        settings = {"type": rule} if isinstance(rule, str) else dict(rule)
        self.rule_name = settings.pop("type", None)
        if not isinstance(self.rule_name, str) or self.rule_name not in RULES:
            raise LossConfigError(
                f"'rule': there is no rule {self.rule_name!r}{suggestion(str(self.rule_name), RULES)}; known: "
                f"{', '.join(RULES)}"
            )
        twice = sorted(options.keys() & settings.keys())
        if twice:
            raise LossConfigError(f"the option '{twice[0]}' is given twice, in 'rule' and beside it")
        options |= settings
        known = _options_of(self.rule_name)
        for name in options:
            if name not in known:
                raise LossConfigError(
                    f"the rule '{self.rule_name}' has no option '{name}'{suggestion(name, known)}; it takes "
                    f"{', '.join(map(str, known.values()))}"
                )
        options = {
            name: check_type(value, known[name].annotation, f"rule '{self.rule_name}', option '{name}'")
            for name, value in options.items()
        }
        missing = [name for name, option in known.items() if option.required and name not in options]
        if missing:
            raise LossConfigError(f"the rule '{self.rule_name}' needs '{missing[0]}'")
        weights = [self.weights[name] for name in self.names]
        self.rule = RULES[self.rule_name](names=self.names, initial_weights=weights, **options)
        if balancing is not None and isinstance(self.rule, UncertaintyWeights):
            raise LossConfigError(
                "'balancing' multiplies weights that are given, but the rule 'uncertainty' learns them; choose one"
            )
        self.signals = self._signals_by_name(signal)
        if self.signals and self.learns:
            raise LossConfigError(
                "'signal': the rule 'uncertainty' learns from the losses themselves; drop one of the two"
            )
        for name in set(self.signals.values()) & set(SIGNALS):
            families = SIGNALS[name].requires
            if self.family not in families:
                raise LossConfigError(f"the signal '{name}' exists for {', '.join(families)} losses alone")
            self.requires = self.requires | families[self.family]

    @classmethod
    def declared_hyperparameters(cls) -> dict[str, Hyperparameter]:
        own = {name: hp for name, hp in hyperparameters_of(cls).items() if name not in ("components", "weights")}
        for rule in RULES:
            for name in _options_of(rule):
                # Rules that share a name may differ in its type and default; the chosen one checks it.
                own.setdefault(name, Hyperparameter(name, Any, None))
        return own

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: BuildContext) -> DynamicMultiObjectiveLoss:
        """Build the objectives; see the class for what `values` holds."""
        if not isinstance(values["objectives"], Mapping):
            raise LossConfigError(f"'objectives': expected a dict name -> loss, found {values['objectives']!r}")
        objectives = {
            name: build_component(config, context, f"objective '{name}'")
            for name, config in values["objectives"].items()
        }
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**{**given, "objectives": objectives})

    def _signals_by_name(self, signal: str | dict | None) -> dict[str, str]:
        if signal is None:
            return {}
        if isinstance(signal, str):
            return dict.fromkeys(self.names, signal)
        for name in signal:
            if name not in self.names:
                raise LossConfigError(
                    f"'signal': there is no objective {name!r}{suggestion(str(name), self.names)}; there are "
                    f"{', '.join(self.names)}"
                )
            if not isinstance(signal[name], str):
                raise LossConfigError(f"'signal': expected a name for '{name}', found {signal[name]!r}")
        return dict(signal)

    def owner_of(self, name: str) -> Any:
        # A learning rate is the optimizer's, which reads it once: a schedule would move nothing.
        return self.rule if name in _options_of(self.rule_name) and name != "learning_rate" else self

    @property
    def learns(self) -> bool:
        """Whether the weights are parameters, trained with the model."""
        return isinstance(self.rule, UncertaintyWeights)

    def current_weights(self) -> dict[str, float]:
        return dict(zip(self.names, self.rule.weights, strict=True))

    def forward(self, batch: Batch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        if not self.learns:
            return super().forward(batch, model_outputs)
        # The weights are on the device, and stay there.
        contributions, reported = self.contributions(batch, model_outputs)
        share = 1 / batch.denominators.micro_batches
        total = self.rule(torch.stack([contributions[name] for name in self.names]), share)
        weights = dict(zip(self.names, self.rule.tensor_weights(), strict=True))
        watch_parts(self, self.gramian(contributions, batch, model_outputs), list(weights.values()))
        return total, self.metrics_of(contributions, weights, total, reported, batch)

    def contributions(self, batch: Batch, outputs: ModelOutputs) -> tuple[dict[str, Tensor], dict[str, Metrics]]:
        contributions, reported = super().contributions(batch, outputs)
        if not self.learns:
            stacked = torch.stack([contributions[name].detach() for name in self.names])
            self.observe("losses", stacked * batch.denominators.step_fraction)
            for name, signal in self.signals.items():
                self.observe(f"signal {name}", measure(signal, name, reported, batch, outputs))
        return contributions, reported

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> Mapping[str, float] | None:
        metrics = super().on_step_end(step, observed)
        if self.learns:
            self.rule.hold()
        if "losses" in observed:
            values = dict(zip(self.names, observed["losses"].tolist(), strict=True))
            for name in self.signals:
                total, count = observed[f"signal {name}"].tolist()
                values[name] = total / count if count else float("nan")
            self.rule.update([values[name] for name in self.names], step)
        return metrics

    def extra_repr(self) -> str:
        options = {name: self.schedules.get(name, getattr(self.rule, name)) for name in _options_of(self.rule_name)}
        described = {"initial_weights": self.weights, "rule": self.rule_name, **options}
        described |= {"signal": self.signals} if self.signals else {}
        parts = [f"{name}={value!r}" for name, value in described.items()]
        return ", ".join(parts + ([] if self.balancer is None else [f"balancing={self.balancer.extra_repr()}"]))


def _options_of(rule: str) -> dict[str, Hyperparameter]:
    """What a rule's constructor takes from a config."""
    return {name: hp for name, hp in hyperparameters_of(RULES[rule]).items() if name not in _FROM_COMPOSITION}
