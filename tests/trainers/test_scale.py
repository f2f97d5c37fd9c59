"""The same five steps on the same global batches, whatever runs them: one process, DDP, ZeRO-2, ZeRO-3, accumulation.

Losses and norms of gradients were found equal to 2e-6 of their value (3e-7 where they are about zero) and weights to
2e-7, in float32 with plain SGD; the bounds below leave room for another machine's order of summation.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from .launching import LAUNCHERS, launch
from .scale_worker import CASES, COUPLED, LOSSES, MODES

pytestmark = pytest.mark.distributed

REFERENCE = "single"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dense_model):
    """Starts a launcher once and returns the logs and weights of all its cases, or how its processes ran."""
    folder, done = tmp_path_factory.mktemp("scale"), {}

    def run(launcher: str, what: str = "results") -> tuple[dict, dict] | list:
        if launcher not in done:
            output = folder / launcher
            output.mkdir()
            launch(launcher, "tests.trainers.scale_worker", dense_model, output, folder=output)
            logs = json.loads((output / "logs.json").read_text())
            weights = torch.load(output / "weights.pt", weights_only=True)
            launched = json.loads((output / "launched.json").read_text())
            done[launcher] = {"results": (logs, weights), "launched": launched}
        return done[launcher][what]

    return run


def steps(logs: list[dict]) -> list[dict]:
    return [entry for entry in logs if "grad_norm" in entry]


def reference_of(case: str) -> str:
    """The case in one batch that an accumulated one is compared with; itself where accumulation makes a difference."""
    name = case.removesuffix("_accumulated")
    return case if name.startswith(COUPLED) else name


@pytest.mark.parametrize(
    "launcher, case",
    [(kind, case) for kind in LAUNCHERS for case in CASES if (kind, case) != (REFERENCE, reference_of(case))],
)
def test_losses_and_weights_are_those_of_one_process_and_one_batch(runs, launcher, case):
    if launcher.startswith("zero"):
        pytest.importorskip("deepspeed")
    reference = reference_of(case)
    logs, weights = runs(launcher)
    expected_logs, expected_weights = runs(REFERENCE)
    found, expected = steps(logs[case]), steps(expected_logs[reference])
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert weights[case].keys() == expected_weights[reference].keys()
    for parameter, value in expected_weights[reference].items():
        torch.testing.assert_close(weights[case][parameter], value, rtol=0, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_a_gradient_and_reaches_what_is_trained_alone(runs, case):
    """Equal weights would prove nothing if no step had been taken."""
    logs, weights = runs(REFERENCE)
    assert all(entry["grad_norm"] > 1e-3 for entry in steps(logs[case]))
    assert {"lora_" in name for name in weights[case]} == {"_lora" in case}


@pytest.mark.parametrize("mode", MODES)
def test_balancing_moves_the_weights_of_the_components(runs, mode):
    logs, _ = runs(REFERENCE)
    assert len({entry["pref_weight"] for entry in steps(logs[f"composed_{mode}"])}) > 2


@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_the_launchers_are_what_they_are_called(runs, launcher):
    if launcher.startswith("zero"):
        pytest.importorskip("deepspeed")
    expected = {"ddp": ("MULTI_CPU", None), "zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 3)}[launcher]
    assert runs(launcher, "launched") == [*expected, 2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["dpo", "grpo"])
def test_different_losses_end_at_different_weights(runs, family, mode):
    """They start at the same ones, so what is compared above is what the losses did."""
    _, weights = runs(REFERENCE)
    ends = [weights[f"{name}_{mode}"] for name, loss in LOSSES.items() if loss["family"] == family]
    for one, other in itertools.combinations(ends, 2):
        assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-4
