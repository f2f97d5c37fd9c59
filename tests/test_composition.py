"""`ComposableLossFunction` and `LossOfLosses` as users subclass them (`composed` has tests of its own)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.example_losses import restored_registry
from trl_custom_losses import (
    ComposableLossFunction,
    Loss,
    LossConfigError,
    LossFunctionRegistry,
    ModelOutputs,
    PolicyBatch,
    PolicyLoss,
    PreferenceBatch,
    PreferenceLoss,
    Rollout,
)
from trl_custom_losses.composition import LossOfLosses
from trl_custom_losses.losses.policy import GRPOLoss
from trl_custom_losses.losses.preference import IPOLoss, SFTLoss, SigmoidLoss
from trl_custom_losses.schedules import Linear
from trl_custom_losses.testing import Data, random_data


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        yield


def _loss_and_metrics(loss: Loss, data: Data) -> tuple[Tensor, dict[str, Any]]:
    value, metrics = loss(*data.build(loss))
    return value, dict(metrics)


def _take_steps(loss: ComposableLossFunction, steps: int) -> list[dict[str, float]]:
    """The weights at each step of a run, with the events that the driver passes on."""
    loss.on_train_begin(steps)
    found = []
    for step in range(steps):
        loss.move_to_step(step)
        found.append(dict(loss.current_weights()))
    return found


# Components and weights


@pytest.mark.parametrize("components", ["list", "tuple", "mapping"])
@pytest.mark.parametrize("weights", ["list", "mapping", "None"])
def test_components_and_weights_by_name_or_in_order(components: str, weights: str) -> None:
    data, parts = random_data("preference"), [SigmoidLoss(beta=0.3), SFTLoss()]
    first, second = (1, 1) if weights == "None" else (0.7, 0.2)
    expected = first * data.loss(parts[0]) + second * data.loss(parts[1])
    given = {"list": parts, "tuple": tuple(parts), "mapping": {"sigmoid": parts[0], "sft": parts[1]}}[components]
    weighed = {"list": [0.7, 0.2], "mapping": {"sft": 0.2, "sigmoid": 0.7}, "None": None}[weights]
    loss = ComposableLossFunction(given, weighed)
    value, metrics = _loss_and_metrics(loss, data)
    torch.testing.assert_close(value, expected)
    assert loss.names == ("sigmoid", "sft")
    assert metrics["sigmoid_weight"].item() == pytest.approx(1.0 if weights == "None" else 0.7)
    assert metrics["sigmoid_loss"].item() == pytest.approx(data.loss(parts[0]).item())


def test_a_weight_left_out_is_one() -> None:
    loss = ComposableLossFunction([SigmoidLoss(), SFTLoss()], {"sft": 2})
    assert loss.weights == {"sigmoid": 1.0, "sft": 2.0} and isinstance(loss.weights["sft"], float)


def test_names_of_components_in_order() -> None:
    class Own(PreferenceLoss):
        pass

    built = LossFunctionRegistry.build("ipo")
    built.name = "main"
    assert ComposableLossFunction([built, Own(), SFTLoss()]).names == ("main", "Own", "sft")


def test_a_component_without_a_name_gets_that_of_its_place() -> None:
    part = SigmoidLoss()
    ComposableLossFunction({"pref": part})
    assert part.name == "pref"
    built = LossFunctionRegistry.build("sigmoid")
    ComposableLossFunction({"pref": built})
    assert built.name == "sigmoid"


@pytest.mark.parametrize(
    ("components", "weights", "message"),
    [
        ([], None, "at least one loss"),
        ({}, None, "at least one loss"),
        ([SFTLoss(), SFTLoss()], None, "share the name 'sft'"),
        ({"a": SFTLoss(), "b": GRPOLoss()}, None, "of one family, found policy and preference"),
        ({"a.b": SFTLoss()}, None, "text without dots, found 'a.b'"),
        ({"total": SFTLoss()}, None, "the metric 'total_loss' is the trainer's"),
        (["sigmoid"], None, "component 'str': expected a loss object, found 'sigmoid'"),
        ({"a": {"type": "sft"}}, None, "component 'a': expected a loss object, found {'type': 'sft'}"),
        ({"a": SFTLoss}, None, "component 'a': expected a loss object, found <class"),
        ([SFTLoss()], [1.0, 2.0], "there are 1 components and 2 weights"),
        ([SFTLoss()], [], "there are 1 components and 0 weights"),
        ([SFTLoss()], {"sf": 1.0}, "a weight for 'sf', but the components are sft"),
        ([SFTLoss()], ["1"], "component 'sft', 'weight': expected float, found '1'"),
        ([SFTLoss()], [True], "'weight': expected float, found True"),
        ([SFTLoss()], [None], "'weight': expected float"),
        ([SFTLoss()], [float("inf")], "'weight': expected a finite number"),
        ([SFTLoss()], [{"schedule": "liner", "start": 0, "end": 1}], r"'weight': .*no schedule 'liner'.*'linear'"),
        ([SFTLoss()], [{"schedule": "linear", "start": 0}], "component 'sft', 'weight': .*needs 'end'"),
        ([SFTLoss()], [{"schedule": "linear", "start": 0, "end": "1"}], "component 'sft', 'weight': .*'end'"),
    ],
    ids=str,
)
def test_mistakes_are_named(components: Any, weights: Any, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        ComposableLossFunction(components, weights)


def test_one_object_cannot_be_two_components() -> None:
    part = SFTLoss()
    with pytest.raises(LossConfigError, match="component 'a': the same object"):
        ComposableLossFunction({"a": part, "b": part})


# Schedules


def test_scheduled_weights_follow_the_step() -> None:
    loss = ComposableLossFunction(
        [SigmoidLoss(), SFTLoss(), IPOLoss()],
        [2.0, {"schedule": "linear", "start": 0.0, "end": 1.0, "total_steps": 2}, Linear(start=1.0, end=0.0)],
    )
    assert loss.weights == {"sigmoid": 2.0, "sft": 0.0, "ipo": 1.0}
    # A left-out `total_steps` is the run's length.
    steps = _take_steps(loss, 4)
    assert [list(weights.values()) for weights in steps] == [[2, 0, 1], [2, 0.5, 0.75], [2, 1, 0.5], [2, 1, 0.25]]
    data = random_data("preference")
    parts = {name: data.loss(part) for name, part in loss.components()}
    value, metrics = _loss_and_metrics(loss, data)
    torch.testing.assert_close(value, 2 * parts["sigmoid"] + parts["sft"] + 0.25 * parts["ipo"])
    assert metrics["ipo_weight"] == 0.25
    assert "ipo': linear(start=1.0, end=0.0)" in repr(loss), "the description names the schedule, not its value"


def test_a_resumed_run_meets_the_schedule_where_it_was() -> None:
    make = {"schedule": "cosine", "start": 1.0, "end": 0.0}
    whole, resumed = (ComposableLossFunction([SFTLoss()], [make]) for _ in range(2))
    expected = _take_steps(whole, 6)
    resumed.on_train_begin(6)
    for step in (4, 5):
        resumed.move_to_step(step)
        assert resumed.current_weights() == expected[step]


# Subclasses


def test_a_composition_of_the_users_own_as_in_the_tutorial() -> None:
    @LossFunctionRegistry.register("pref_and_sft")
    class PrefAndSFT(ComposableLossFunction):
        family = "preference"

        def __init__(self, *, pref: dict | None = None, pref_weight: float = 0.7, sft_weight: float = 0.3) -> None:
            components = [LossFunctionRegistry.build(pref or "sigmoid"), SFTLoss()]
            super().__init__(components, [pref_weight, sft_weight])

    loss = LossFunctionRegistry.build({"type": "pref_and_sft", "pref": {"type": "ipo", "beta": 0.4}, "sft_weight": 2})
    assert (loss.name, loss.family, loss.weights) == ("pref_and_sft", "preference", {"ipo": 0.7, "sft": 2.0})
    data = random_data("preference")
    value, metrics = _loss_and_metrics(loss, data)
    torch.testing.assert_close(value, 0.7 * data.loss(IPOLoss(beta=0.4)) + 2 * data.loss(SFTLoss()))
    assert list(metrics)[:5] == ["ipo_loss", "ipo_weight", "sft_loss", "sft_weight", "total_loss"]
    with pytest.raises(LossConfigError, match="cannot run in a GRPO trainer"):
        LossFunctionRegistry.build("pref_and_sft", family="policy")
    schedule = {"schedule": "linear", "start": 0, "end": 1}
    with pytest.raises(LossConfigError, match="'sft_weight' cannot be scheduled: the loss must keep it"):
        LossFunctionRegistry.build({"type": "pref_and_sft", "sft_weight": schedule})
    with pytest.raises(LossConfigError, match=r"has no hyperparameter 'sft_wieght' \(did you mean .*'sft_weight'"):
        LossFunctionRegistry.build({"type": "pref_and_sft", "sft_wieght": 1})


def test_a_subclass_may_take_schedules_for_its_weights_and_balance() -> None:
    @LossFunctionRegistry.register("scheduled_pair")
    class Scheduled(ComposableLossFunction):
        family = "preference"

        def __init__(self, *, sft_weight: float = 1.0, balancing: str | None = None) -> None:
            super().__init__([SigmoidLoss(), SFTLoss()], {"sft": sft_weight}, balancing=balancing)

        @property
        def sft_weight(self) -> float:
            return self.weights["sft"]

        @sft_weight.setter
        def sft_weight(self, value: float) -> None:
            self.weights["sft"] = value

    schedule = {"schedule": "linear", "start": 1, "end": 0, "total_steps": 4}
    loss = LossFunctionRegistry.build({"type": "scheduled_pair", "sft_weight": schedule, "balancing": "mgda"})
    loss.move_to_step(1)
    assert loss.weights == {"sigmoid": 1.0, "sft": 0.75} and loss.balancer is not None


def test_a_subclass_may_hold_weights_of_its_own_making() -> None:
    class Alternating(ComposableLossFunction):
        def current_weights(self) -> dict[str, float]:
            return {"sigmoid": 3.0, "sft": 0.5}

    data = random_data("preference")
    value, metrics = _loss_and_metrics(Alternating([SigmoidLoss(), SFTLoss()]), data)
    torch.testing.assert_close(value, 3 * data.loss(SigmoidLoss()) + 0.5 * data.loss(SFTLoss()))
    assert metrics["sigmoid_weight"] == 3 and metrics["sft_weight"] == 0.5


def test_a_given_object_is_a_loss_like_any_other() -> None:
    loss = LossFunctionRegistry.build(ComposableLossFunction([SigmoidLoss(), SFTLoss()]), family="preference")
    assert loss.name == "ComposableLossFunction" and [leaf.name for leaf in loss.leaves()] == ["sigmoid", "sft"]
    with pytest.raises(LossConfigError, match="is a policy loss and cannot run in a DPO trainer"):
        LossFunctionRegistry.build(ComposableLossFunction([GRPOLoss()]), family="preference")


def test_a_class_that_takes_positional_components_says_so_in_a_config() -> None:
    loss = LossFunctionRegistry.build
    with pytest.raises(LossConfigError, match="expected a loss object, found 'sigmoid'"):
        loss({"type": "trl_custom_losses:ComposableLossFunction", "components": ["sigmoid"]})


# What compositions declare


class Needy(PolicyLoss):
    """Declares one of everything."""

    requires = {"rewards", "pooled_hidden"}
    rollout_requires = frozenset({"pooled_hidden"})
    columns = ("target", "weight")
    column_scorers = {"weight": ("completion", "tests.example_losses:plain")}
    batch_coupled = True
    minimum_batch = 3
    surrogate = False
    reduction = "sequence_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return model_outputs.pooled_hidden.sum(1), {}


class Plain(PolicyLoss):
    columns = ("weight", "other")
    minimum_batch = 2

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return model_outputs.per_token_logps, {}


def test_needs_and_facts_are_united() -> None:
    loss = LossOfLosses({"plain": Plain(), "needy": Needy()})
    assert loss.family == "policy" and loss.composite
    assert loss.requires == {"rewards", "pooled_hidden"} and isinstance(loss.requires, frozenset)
    assert loss.rollout_requires == {"pooled_hidden"}
    assert loss.columns == ("weight", "other", "target")
    assert loss.column_scorers == Needy.column_scorers
    assert loss.batch_coupled and loss.minimum_batch == 3
    assert not LossOfLosses({"plain": Plain()}).batch_coupled


def test_needs_reach_the_top_through_compositions_in_between() -> None:
    inner = ComposableLossFunction({"needy": Needy(), "plain": Plain()})
    loss = ComposableLossFunction({"inner": inner, "grpo": GRPOLoss()})
    assert loss.requires == {"rewards", "pooled_hidden", "old_per_token_logps"}
    assert loss.columns == ("target", "weight", "other") and loss.minimum_batch == 3 and loss.batch_coupled
    assert loss.kl_reduction == "token_mean", "the first surrogate's"
    assert [part.name for part in loss.tree()] == ["", "inner", "needy", "plain", "grpo"]


def test_scorers_of_one_column_must_agree() -> None:
    class Other(Needy):
        column_scorers = {"weight": ("completion", "tests.example_losses:annotated")}

    assert LossOfLosses({"a": Needy(), "b": Needy()}).column_scorers == Needy.column_scorers
    with pytest.raises(LossConfigError, match=r"column 'weight' has two scorers, .*:plain' and .*:annotated'"):
        LossOfLosses({"a": Needy(), "b": Other()})


def test_prepares_by_name_and_hands_each_its_own() -> None:
    class Preparing(Plain):
        def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
            return {"own": torch.full((4,), 2.0)}

        def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            return batch["own"].unsqueeze(1) * model_outputs.per_token_logps, {}

    loss = ComposableLossFunction({"plain": Plain(), "preparing": Preparing()})
    assert loss.prepares and set(loss.prepare(Rollout.__new__(Rollout))) == {"preparing.own"}
    data = random_data("policy")
    value, _ = _loss_and_metrics(loss, data)
    torch.testing.assert_close(value, 3 * data.loss(Plain()))
    assert not ComposableLossFunction({"plain": Plain()}).prepares


def test_contributions_are_reduced_before_their_weights() -> None:
    class Reporting(PreferenceLoss):
        reduction = "token_mean"

        def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            return -model_outputs.per_token_logps, {"mine": model_outputs.logps.detach()}

    loss = ComposableLossFunction({"a": SigmoidLoss(), "b": Reporting()}, [3.0, 0.0])
    data = random_data("preference")
    shared = data.denominators(micro_batches=2)
    batch, outputs = data.take([1, 2]).build(loss, shared)
    contributions, reported = loss.contributions(batch, outputs)
    assert list(contributions) == ["a", "b"] and list(reported["b"]) == ["mine"]
    for name, part in loss.components():
        torch.testing.assert_close(contributions[name], data.take([1, 2]).loss(part, shared))
        assert contributions[name].shape == () and contributions[name].requires_grad
    assert reported["b"]["mine"].shape == (4,)


def test_a_composition_of_something_else_than_a_sum() -> None:
    class Largest(LossOfLosses):
        """The largest of several losses."""

        def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            contributions, _ = self.contributions(batch, model_outputs)
            return torch.stack(list(contributions.values())).amax(), {}

    loss = Largest({"sigmoid": SigmoidLoss(), "sft": SFTLoss()})
    data = random_data("preference")
    assert data.loss(loss) == max(data.loss(SigmoidLoss()), data.loss(SFTLoss()))
    nested = ComposableLossFunction({"largest": loss, "ipo": IPOLoss()}, [0.5, 1.0])
    torch.testing.assert_close(data.loss(nested), 0.5 * data.loss(loss) + data.loss(IPOLoss()))


# Nesting and copies


def test_events_reach_nested_schedules() -> None:
    schedule = {"schedule": "linear", "start": 0.0, "end": 1.0}
    inner = ComposableLossFunction([SFTLoss()], [schedule])
    outer = ComposableLossFunction({"inner": inner, "ipo": IPOLoss()}, {"inner": schedule})
    for part in outer.tree():
        part.on_train_begin(4)
    for part in outer.tree():
        part.move_to_step(1)
    assert inner.weights == {"sft": 0.25} and outer.weights == {"inner": 0.25, "ipo": 1.0}
    data = random_data("preference")
    torch.testing.assert_close(data.loss(outer), data.loss(SFTLoss()) / 16 + data.loss(IPOLoss()))


def test_copies_are_independent() -> None:
    loss = ComposableLossFunction([SigmoidLoss(), SFTLoss()], balancing="upgrad")
    other = copy.deepcopy(loss)
    other.weights["sft"] = 5.0
    other.balancer.update(torch.eye(2, dtype=torch.float64))
    assert loss.weights["sft"] == 1.0 and loss.balancer.steps == 0
    assert set(loss.state_dict()) == {"balancer.average", "balancer.steps"}
