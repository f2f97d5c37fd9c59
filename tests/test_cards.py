"""Loss cards: docstrings read, examples that build."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from torch import Tensor

from trl_custom_losses import LossFunctionRegistry, PreferenceLoss
from trl_custom_losses.cards import COSTS, example_config, loss_card
from trl_custom_losses.types import REQUIREMENTS

from .example_losses import restored_registry

each_loss = pytest.mark.parametrize("name", LossFunctionRegistry.names())


class Base(PreferenceLoss):
    """A base.

    Args:
        beta: Strength, > 0,
            per nat.
        shared: Said
            here.
        **options: Of nothing.
    """

    def __init__(self, *, beta: float = 0.1, shared: float | None = None) -> None:
        super().__init__()
        self.beta, self.shared = beta, shared

    def forward(self, batch: Any, model_outputs: Any) -> tuple[Tensor, dict]:
        return model_outputs.logps.chunk(2)[0], {}


class Derived(Base):
    """First line
    of the summary.

    loss = beta
        x

    A note: with a colon
    and two lines.

    Another.

    Args:
        one, two: Both
            of these.
        beta: Weaker than in the base (see `Base`).
        shared: As for `Base`.

    Errors: Something
    wrong.

    Source: Somebody 2020, arXiv:2001.01234; other,
    arXiv:2112.54321.
    """

    requires = frozenset({"ref_logps"})
    example = {"one": 3, "beta": 9.0, "shared": 4.0}

    def __init__(self, *, one: int, two: str | None = "b", **options: Any) -> None:
        super().__init__(**options)
        self.one, self.two = one, two
        self.requires = frozenset({"ref_logps", "logits"}) if one == 3 else self.requires
        self.columns = ("weight",)


@pytest.fixture
def derived() -> Iterator[str]:
    with restored_registry():
        LossFunctionRegistry.register("derived")(Derived)
        yield "derived"


def test_a_docstring_is_read(derived: str) -> None:
    card = loss_card(derived)
    assert card.summary == "First line of the summary."
    assert card.formula == "loss = beta\n    x"
    assert card.notes == ("A note: with a colon and two lines.", "Another.")
    assert card.errors == "Something wrong."
    assert card.papers == ["2001.01234", "2112.54321"]
    assert card.family == "preference"


def test_arguments_are_described_by_the_nearest_class_that_says_it_itself(derived: str) -> None:
    descriptions = loss_card(derived).descriptions
    assert descriptions["one"] == descriptions["two"] == "Both of these."
    assert descriptions["beta"] == "Strength, > 0, per nat."
    assert descriptions["shared"] == "Said here."


def test_the_example_fills_what_has_no_default(derived: str) -> None:
    assert loss_card(derived).config == {"type": "derived", "one": 3, "two": "b", "beta": 0.1, "shared": 4.0}
    assert loss_card(derived).requires == ("logits", "ref_logps")  # those of the built loss
    assert loss_card(derived).columns == ("weight",)


def test_without_an_example_the_class_speaks(derived: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Derived, "example", {})
    card = loss_card(derived)
    assert card.config is None and card.requires == ("ref_logps",) and card.columns == ()


def test_a_loss_may_have_no_docstring(derived: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Derived, "__doc__", None)
    card = loss_card(derived)
    assert (card.summary, card.formula, card.notes, card.errors, card.source, card.papers) == ("", "", (), "", "", [])


@each_loss
def test_every_card_is_whole(name: str) -> None:
    card = loss_card(name)
    assert card.summary and card.formula and card.source
    described = {hp.name for hp in card.hyperparameters.values() if hp.annotation is not Any or hp.required}
    assert described <= set(card.descriptions)
    assert all(card.descriptions[hp] for hp in described)
    assert json.loads(json.dumps(card.to_dict()))["name"] == name


@each_loss
def test_every_example_builds_from_yaml_as_it_stands_and_whole(name: str) -> None:
    config = example_config(name)
    assert config is not None
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    example = LossFunctionRegistry.get(name).example
    for block in (config, {"type": name, **example}):
        assert LossFunctionRegistry.build(block).name == name
    required = {hp.name for hp in LossFunctionRegistry.get(name).declared_hyperparameters().values() if hp.required}
    assert required <= set(example)


def test_every_requirement_has_its_cost() -> None:
    assert set(COSTS) == frozenset().union(*REQUIREMENTS.values())


def test_types_are_written_without_modules() -> None:
    hyperparameters = loss_card("clipped_loss").hyperparameters
    assert hyperparameters["base_loss"].type_name == "Loss | str | dict"
    assert hyperparameters["per"].type_name == "'batch' | 'sequence'"
    assert loss_card("dynamic_multi_objective").hyperparameters["objectives"].type_name == "Mapping[str, Loss]"
