"""Each check finds the mistake it is for, and says so; a right loss passes all of them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from torch import Tensor

from trl_custom_losses import LossConfigError, LossFunctionRegistry
from trl_custom_losses.testing import CHECKS, LossCheckError, check_loss, parametrize_with_checks, run_checks

from ..example_losses import Mine, Protocol, annotated
from .broken import BROKEN, Right, RightPolicy
from .broken.gradients import DetachesAHalf
from .broken.invariances import AveragesItself
from .broken.syncs import PrintsAWord
from .right import RIGHT


def _name(loss: Any) -> str:
    """For the test's name; of a composition, that of its parts."""
    if isinstance(loss, dict):
        return "+".join(type(part).__name__ for _, _, part in loss["components"])
    return getattr(loss, "__name__", type(loss).__name__)


_CASES = [
    pytest.param(check, loss, words, id=f"{check}-{_name(loss)}")
    for check, losses in BROKEN.items()
    for loss, words in losses
]
_FIRST = [name for name, check in CHECKS.items() if check.first]


def test_every_check_has_a_loss_that_it_catches() -> None:
    assert BROKEN.keys() == CHECKS.keys()


@pytest.mark.parametrize(("check", "loss", "words"), _CASES)
def test_a_broken_loss_is_caught(check: str, loss: Any, words: str) -> None:
    report = run_checks(loss, checks=[check])
    (result,) = report.results
    assert result.check == check and not result.ok
    assert words in result.message
    raised = result.message.startswith("the loss raises ")  # which says itself what is the matter
    assert raised or f"Usual cause: {CHECKS[check].usual_cause}" in result.message


@pytest.mark.parametrize("loss", RIGHT, ids=_name)
def test_a_right_loss_passes_every_check(loss: Any) -> None:
    report = check_loss(loss)
    assert report.ok and [result.check for result in report.results] == list(CHECKS)


@pytest.mark.parametrize("loss", [Right, RightPolicy])
def test_the_report_names_the_loss(loss: type) -> None:
    report = run_checks(loss, checks=["padding"])
    assert (report.loss, report.family) == (loss.__name__, loss.family)


def test_the_error_lists_all_failed_checks() -> None:
    with pytest.raises(LossCheckError) as caught:
        check_loss(DetachesAHalf, checks=["gradient", "padding", "permutation"])
    assert isinstance(caught.value, AssertionError)
    assert [result.check for result in caught.value.report.failed] == ["gradient"]
    assert "2 of 3 checks passed" in str(caught.value) and "\ngradient: the gradient with respect to" in str(
        caught.value
    )


@pytest.mark.parametrize("check", _FIRST)
def test_after_a_check_on_which_others_stand_none_is_run(check: str) -> None:
    (loss, _), *_ = BROKEN[check]
    report = run_checks(loss)
    before = list(CHECKS)[: list(CHECKS).index(check)]
    assert [result.check for result in report.passed] == before and len(report.results) == len(CHECKS)
    assert [result.check for result in report.failed] == [check]
    assert {result.message for result in report.not_run} == {f"because '{check}' failed"}


def test_the_checks_on_which_others_stand() -> None:
    assert _FIRST == ["prepare_returns", "declared_needs", "returns", "same_input_same_output"]


def test_what_a_loss_prints_or_warns_of_is_not_shown(
    capsys: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    class Warns(PrintsAWord):
        def of(self, margin: Tensor) -> Tensor:
            warnings.warn("a few steps", stacklevel=1)
            return super().of(margin)

    report = run_checks(Warns)
    assert [result.check for result in report.failed] == ["no_host_sync"]
    assert capsys.readouterr().out == "" and not recwarn.list


def test_the_report_is_json() -> None:
    found = json.loads(json.dumps(run_checks(AveragesItself, checks=["padding", "micro_batches"]).to_dict()))
    assert (found["loss"], found["family"], found["ok"]) == ("AveragesItself", "preference", False)
    assert [(result["check"], result["ok"]) for result in found["results"]] == [
        ("padding", True),
        ("micro_batches", False),
    ]
    assert found["seconds"] == sum(result["seconds"] for result in found["results"]) > 0


# What can be checked


@pytest.mark.parametrize(
    ("loss", "hyperparameters", "name"),
    [
        ("hinge", {"beta": 0.3}, "hinge"),
        ({"type": "hinge", "beta": 0.3}, {}, "hinge"),
        ("exo_pair", {}, "exo_pair"),  # whose hyperparameter without a default comes from its example
        ("tests.example_losses:Mine", {"strength": 2.0}, "tests.example_losses:Mine"),
        (Mine, {"strength": 2.0}, "Mine"),
        (Mine(strength=2.0), {}, "Mine"),
        (annotated, {"beta": 0.5}, "annotated"),
        (Protocol, {"weight": 3.0}, "Protocol"),
        (LossFunctionRegistry.build({"type": "hinge", "beta": 0.5}), {}, "hinge"),
    ],
    ids=str,
)
def test_losses_in_every_form(loss: object, hyperparameters: dict, name: str) -> None:
    report = run_checks(loss, checks=["returns", "padding", "state", "composition", "gradient"], **hyperparameters)
    assert report.ok, str(report)
    assert report.loss == name


def test_hyperparameters_reach_the_loss() -> None:
    with pytest.raises(LossConfigError, match="beta"):
        run_checks("hinge", beta=-1.0)
    with pytest.raises(LossConfigError, match="no_such"):
        run_checks("hinge", no_such=1.0)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("no_such_loss", "no_such_loss"),
        ({"beta": 1.0}, "'type'"),
        (3, "found 3"),
        (lambda batch, outputs: None, "family"),
    ],
)
def test_what_is_no_loss_is_refused(loss: object, words: str) -> None:
    with pytest.raises(LossConfigError, match=words):
        run_checks(loss)


def test_an_object_has_its_own_hyperparameters() -> None:
    with pytest.raises(LossConfigError, match="has its own"):
        run_checks(Right(), beta=2.0)


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(LossConfigError, match=r"'paddin'.*did you mean 'padding'"):
        run_checks(Right, checks=["paddin"])


# As tests


@parametrize_with_checks(Right, "hinge", beta=0.3)
def test_one_test_for_each_check(check) -> None:
    check()


def test_the_test_of_a_check_fails_where_the_loss_does() -> None:
    marked = parametrize_with_checks(AveragesItself, checks=["padding", "micro_batches"])
    cases = marked.args[1]
    assert [case.id for case in cases] == ["AveragesItself-padding", "AveragesItself-micro_batches"]
    passing, failing = (case.values[0] for case in cases)
    passing()
    with pytest.raises(LossCheckError, match="summed over 2 micro-batches"):
        failing()


def test_a_loss_that_ends_the_program_fails_and_the_program_goes_on() -> None:
    class Ends(Right):
        def forward(self, batch: object, model_outputs: object) -> tuple:
            raise SystemExit("enough")

    report = run_checks(Ends)
    assert "SystemExit: enough" in report.failed[0].message
