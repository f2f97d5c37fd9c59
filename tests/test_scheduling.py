"""Any numeric hyperparameter of any loss, and any component's weight, can follow a schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, LossFunctionRegistry, PreferenceLoss
from trl_custom_losses.hyperparameters import check_range
from trl_custom_losses.losses.preference.beta_strategies import STRATEGIES
from trl_custom_losses.reductions import FixedLengthMean, evaluate
from trl_custom_losses.schedules import accepts_numbers
from trl_custom_losses.testing import random_data

from .example_losses import restored_registry
from .losses.configs import configs


class Doubling(PreferenceLoss):
    """Keeps something computed from its hyperparameter."""

    def __init__(self, *, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = check_range("strength", strength, above=0, at_most=4)
        self.twice = 2 * strength

    def forward(self, batch: Any, model_outputs: Any) -> tuple[Tensor, dict]:
        return -self.twice * model_outputs.logps.chunk(2)[0], {}


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        LossFunctionRegistry.register("doubling")(Doubling)
        yield


def linear(start: float, end: float) -> dict[str, Any]:
    return {"schedule": "linear", "start": start, "end": end, "total_steps": 10}


def _numeric() -> list[tuple[str, str, str]]:
    """Family, test id and hyperparameter of everything numeric that has a number as its default."""
    found = []
    for family in ("preference", "policy"):
        for name, config in configs(family).items():
            declared = LossFunctionRegistry.get(config["type"]).declared_hyperparameters()
            for hyperparameter, declaration in declared.items():
                value = config.get(hyperparameter, declaration.default)
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and accepts_numbers(declaration.annotation) and not _refused(name, config, hyperparameter):
                    found.append((family, name, hyperparameter))
    return found


def _refused(name: str, config: dict[str, Any], hyperparameter: str) -> bool:
    """`adaptive_dpo` moves beta itself; it and `consistency` refuse what the chosen strategy or mode does not read."""
    if config["type"] == "consistency":
        return config.get("mode") == "rdrop" and hyperparameter == "threshold"
    if config["type"] != "adaptive_dpo":
        return False
    reads = STRATEGIES[config.get("strategy", "schedule")].reads
    return hyperparameter == "beta" or hyperparameter not in reads


@pytest.mark.parametrize(("family", "name", "hyperparameter"), _numeric())
def test_every_numeric_hyperparameter_moves(family: str, name: str, hyperparameter: str) -> None:
    """At each step the loss is the one that is built with that step's value."""
    config = configs(family)[name]
    declared = LossFunctionRegistry.get(config["type"]).declared_hyperparameters()[hyperparameter]
    value = config.get(hyperparameter, declared.default)
    start, end = value, value * 1.25 if value else 0.25
    if declared.annotation is int:
        end = value + 2
    try:
        LossFunctionRegistry.build({**config, hyperparameter: end}, family=family)
    except LossConfigError:  # out of its range
        end = value * 0.75
    moving = LossFunctionRegistry.build({**config, hyperparameter: linear(start, end)}, family=family)
    data = random_data(family)
    for step in (0, 4, 10):
        moving.move_to_step(step)
        expected = start + step / 10 * (end - start)
        if declared.annotation is int:
            expected = round(expected)
        fixed = LossFunctionRegistry.build({**config, hyperparameter: expected}, family=family)
        fixed.move_to_step(step)
        assert torch.equal(data.loss(moving), data.loss(fixed)), step
        assert moving.moving()[hyperparameter] == pytest.approx(expected)


def test_the_value_is_logged_under_the_hyperparameters_name() -> None:
    loss = LossFunctionRegistry.build({"type": "sigmoid", "beta": linear(1.0, 0.0 + 0.5)})
    loss.move_to_step(5)
    batch, outputs = random_data("preference").build(loss)
    _, metrics = evaluate(loss, batch, outputs)
    assert metrics["beta"].item() == 0.75 and not metrics["beta"].requires_grad


def test_a_component_logs_its_own_value_under_its_name_where_two_move() -> None:
    components = [
        {"type": "sigmoid", "name": "a", "beta": linear(1.0, 2.0)},
        {"type": "ipo", "name": "b", "beta": linear(3.0, 1.0), "weight": linear(0.0, 1.0)},
    ]
    loss = LossFunctionRegistry.build({"type": "composed", "components": components})
    for part in loss.tree():
        part.move_to_step(5)
    batch, outputs = random_data("preference").build(loss)
    _, metrics = loss(batch, outputs)
    assert (metrics["a/beta"], metrics["b/beta"]) == (1.5, 2.0)
    assert (metrics["a_weight"], metrics["b_weight"]) == (1.0, 0.5)


def test_a_reduction_follows() -> None:
    loss = LossFunctionRegistry.build({"type": "dr_grpo", "max_completion_length": linear(10, 20)})
    loss.move_to_step(5)
    assert loss.reduction == FixedLengthMean(15)


def test_schedules_are_described() -> None:
    loss = LossFunctionRegistry.build({"type": "sigmoid", "beta": linear(1.0, 0.5)})
    assert str(loss.hyperparameters()["beta"]) == "linear(total_steps=10, start=1.0, end=0.5)"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "sigmoid", "beta": linear(1.0, 0.0)}, "'beta' is scheduled, .* reaches 0: .*value > 0"),
        (
            {"type": "sigmoid", "beta": {"schedule": "liner"}},
            "hyperparameter 'beta': .*did you mean 'linear'",
        ),
        ({"type": "exo_pair", "label_smoothing": linear(0.1, 0.0)}, "reaches 0: .*label_smoothing"),
        ({"type": "sigmoid", "f_divergence_type": linear(1, 2)}, "expected .*reverse_kl"),
        ({"type": "sigmoid", "bta": linear(1, 2)}, "has no hyperparameter 'bta'"),
        ({"type": "doubling", "strength": linear(1.0, 5.0)}, "reaches 5: .*strength.*<= 4"),
        ({"type": "doubling", "strength": linear(1.0, 3.0)}, "cannot be scheduled: `twice` is computed from it"),
        (
            {"type": "composed", "components": [{"type": "sft", "weight": {"schedule": "linear", "start": 1.0}}]},
            "component 'sft', 'weight': the schedule 'linear' needs 'end'",
        ),
    ],
    ids=str,
)
def test_a_bad_schedule_is_rejected_when_the_loss_is_built(config: dict[str, Any], message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        LossFunctionRegistry.build(config)


def test_a_functions_and_an_objects_hyperparameters_move() -> None:
    def scaled(batch: Any, outputs: Any, *, scale: float = 1.0) -> tuple[Tensor, dict]:
        return -scale * outputs.logps.chunk(2)[0], {}

    class Plain:
        """No `Loss`, but an object that can be called."""

        family = "preference"

        def __init__(self, scale: float = 1.0) -> None:
            self.scale = scale
            self.events: list[tuple] = []

        def __call__(self, batch: Any, outputs: Any) -> tuple[Tensor, dict]:
            return -self.scale * outputs.logps.chunk(2)[0], {}

        def on_step_begin(self, step: int) -> None:
            self.events.append(("begin", step))

    LossFunctionRegistry.register("scaled", family="preference")(scaled)
    LossFunctionRegistry.register("plain")(Plain)
    data = random_data("preference")
    for name in ("scaled", "plain"):
        loss = LossFunctionRegistry.build({"type": name, "scale": linear(1.0, 3.0)})
        before = data.loss(loss).item()
        loss.move_to_step(10)
        assert data.loss(loss).item() == pytest.approx(3 * before)
    loss.on_step_begin(4)
    assert loss.object.events == [("begin", 4)]


def test_a_random_start_is_not_taken_for_something_computed_from_the_hyperparameter() -> None:
    class Random(PreferenceLoss):
        """Starts anew each time."""

        def __init__(self, *, strength: float = 1.0) -> None:
            super().__init__()
            self.strength = strength
            self.head = torch.nn.Linear(2, 2)

    LossFunctionRegistry.register("random_start")(Random)
    loss = LossFunctionRegistry.build({"type": "random_start", "strength": linear(1.0, 2.0)})
    loss.move_to_step(10)
    assert loss.strength == 2.0


def test_what_is_computed_from_it_shows_however_the_constructor_keeps_it() -> None:
    class Scaled(PreferenceLoss):
        """Keeps another value under the hyperparameter's name, and one computed from it."""

        def __init__(self, *, tau: float = 1.0) -> None:
            super().__init__()
            self.tau, self.inverse = 2 * tau, 1 / tau

    class RandomScaled(PreferenceLoss):
        """Starts at random, on a scale that is the hyperparameter."""

        def __init__(self, *, tau: float = 1.0) -> None:
            super().__init__()
            self.tau = tau
            self.start = torch.nn.Parameter(tau * torch.randn(3))

    for loss, stale in ((Scaled, "inverse"), (RandomScaled, "start")):
        LossFunctionRegistry.register(loss.__name__)(loss)
        with pytest.raises(LossConfigError, match=f"`{stale}` is computed from it"):
            LossFunctionRegistry.build({"type": loss.__name__, "tau": linear(1.0, 2.0)})
