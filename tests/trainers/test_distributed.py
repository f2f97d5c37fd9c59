"""Two processes on half the batch each do what one process does on the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .distributed_worker import ADAPTIVE, CASES, COUPLED
from .launching import launch
from .parity import OUR_METRICS

pytestmark = pytest.mark.distributed

UNRELATED = ("runtime", "per_second", "step_time", "total_flos")  # times; the padding of a micro-batch
# Per micro-batch by definition, so that they depend on how the batch is split over micro-batches.
SPLIT_DEPENDENT = ("entropy", "kl", "logits/", "mean_token_accuracy", "clip_ratio/")
# Evaluation averages the batches' losses, as in TRL, so a token mean depends on how the set is split.
TOKEN_MEANS = ("eval_loss", "eval_sft_loss", "eval_total_loss")


def run_all(world: int, model: Path, output: Path) -> tuple[dict, dict, list]:
    """Run all cases in `world` processes; returns logs and weights by case, and the losses' states by rank."""
    output.mkdir()
    launch("single" if world == 1 else "ddp", "tests.trainers.distributed_worker", model, output, folder=output)
    states = [torch.load(output / f"state{rank}.pt", weights_only=True) for rank in range(world)]
    weights = torch.load(output / "weights.pt", weights_only=True)
    return json.loads((output / "logs.json").read_text()), weights, states


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dense_model):
    """Logs and weights of all cases, in one process and in two."""
    folder = tmp_path_factory.mktemp("distributed")
    return {world: run_all(world, dense_model, folder / f"world{world}") for world in (1, 2)}


def compare_logs(found: list[dict], expected: list[dict], ignore: tuple[str, ...] = ()) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not any(part in name for part in (*UNRELATED, *ignore)):
                assert ours[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("case", [name for name in CASES if not name.endswith("_stock")])
def test_two_processes_equal_one(runs, case):
    (single_logs, single_weights, _), (double_logs, double_weights, _) = runs[1], runs[2]
    ignore = (*SPLIT_DEPENDENT, *TOKEN_MEANS) if "accumulation" in CASES[case] else ()
    token_mean = "sft" in json.dumps(CASES[case]["loss"], default=str)
    compare_logs(double_logs[case], single_logs[case], (*ignore, *(TOKEN_MEANS if token_mean else ())))
    for name, weight in single_weights[case].items():
        torch.testing.assert_close(double_weights[case][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [name for name in ADAPTIVE if name not in COUPLED])
@pytest.mark.parametrize("world", [1, 2])
def test_adaptive_losses_do_not_depend_on_how_a_batch_is_split(runs, world, case):
    logs, weights, states = runs[world]
    compare_logs(logs[f"{case}_accumulated"], logs[case], (*SPLIT_DEPENDENT, *TOKEN_MEANS, "grad_norm", "clip"))
    for name, weight in weights[case].items():
        torch.testing.assert_close(weights[f"{case}_accumulated"][name], weight, rtol=1e-5, atol=1e-6)
    for name, value in states[0][case].items():
        torch.testing.assert_close(states[0][f"{case}_accumulated"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", list(ADAPTIVE))
def test_states_are_bit_identical_on_both_ranks_and_equal_to_one_process(runs, case):
    (single,), (first, second) = runs[1][2], runs[2][2]
    assert first[case].keys() == second[case].keys() == single[case].keys()
    for name, value in first[case].items():
        assert torch.equal(value, second[case][name]), name
        torch.testing.assert_close(value, single[case][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stock, ours", [("dpo_stock", "dpo_sigmoid"), ("grpo_stock", "grpo_grpo")])
@pytest.mark.parametrize("world", [1, 2])
def test_logs_and_weights_equal_those_of_trl_on_as_many_processes(runs, world, stock, ours):
    logs, weights, _ = runs[world]
    spread = {f"{prefix}{name}" for prefix in ("", "eval_") for name in OUR_METRICS}
    compare_logs([{k: v for k, v in entry.items() if k not in spread} for entry in logs[ours]], logs[stock])
    for name, weight in weights[stock].items():
        torch.testing.assert_close(weights[ours][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case", ["dpo_sigmoid", "dpo_sft", "grpo_grpo", "grpo_dapo", "dpo_monitored", "grpo_monitored"]
)
@pytest.mark.parametrize("world", [1, 2])
def test_accumulation_equals_the_big_batch(runs, world, case):
    logs, weights, _ = runs[world]
    compare_logs(logs[f"{case}_accumulated"], logs[case], SPLIT_DEPENDENT)
    for name, weight in weights[case].items():
        torch.testing.assert_close(weights[f"{case}_accumulated"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["dpo_monitored", "grpo_monitored"])
def test_the_gradient_monitor_reported(runs, case):
    """So that the comparisons above compared it."""
    for entry in (entry for world in (1, 2) for entry in runs[world][0][case] if "loss" in entry):
        norms = {name.split("/")[0] for name, value in entry.items() if name.startswith("grad_") and value > 0}
        assert norms >= {"grad_norm", "grad_norm_weighted", "grad_norm_layer"}
        assert any(name.startswith("grad_cosine/") for name in entry)
        assert any(name.endswith("clipped_sequences") for name in entry) == case.startswith("grpo")


@pytest.mark.parametrize("case", list(CASES))
def test_the_trainings_moved_the_weights(runs, case, dense_model):
    """Equal weights would prove nothing if no step had been taken."""
    logs = [entry for entry in runs[1][0][case] if "grad_norm" in entry]
    assert len(logs) == 3
    assert all(entry["grad_norm"] > 1e-3 for entry in logs)
