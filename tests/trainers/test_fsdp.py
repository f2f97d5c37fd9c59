"""FSDP2 for real, on two CPU processes: what is sharded trains as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .fsdp_worker import NAMES

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"


def launch(world: int, model: Path, output: Path, *words: str) -> list[tuple[dict, dict]]:
    """Run all cases in `world` processes; returns each rank's results and weights.

    Args:
        world: Number of processes; one is not sharded.
        model: Folder of the model.
        output: Folder to make and to write to.
        *words: Further options of `accelerate launch`.
    """
    output.mkdir()
    program = [sys.executable]
    if world > 1:
        program += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", str(world)]
        program += ["--mixed_precision", "no", "--main_process_port", "0", *words]
    command = [*program, "-m", "tests.trainers.fsdp_worker", str(model), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return [
        (
            json.loads((output / f"rank{rank}.json").read_text()),
            torch.load(output / f"weights{rank}.pt", weights_only=True),
        )
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dense_model):
    """Results and weights by world size and rank."""
    folder = tmp_path_factory.mktemp("fsdp")
    return {world: launch(world, dense_model, folder / f"world{world}") for world in (1, 2)}


@pytest.mark.parametrize("case", NAMES)
def test_two_sharded_processes_equal_one(runs, case):
    ((single, single_weights),), ((first, first_weights), (_, second_weights)) = runs[1], runs[2]
    losses = [[entry["loss"] for entry in run["logs"][case] if "loss" in entry] for run in (single, first)]
    norms = [[entry["grad_norm"] for entry in run["logs"][case] if "loss" in entry] for run in (single, first)]
    assert len(losses[0]) == 3 and norms[0][0] > 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=2e-5, abs=2e-6)
    assert norms[1] == pytest.approx(norms[0], rel=2e-5, abs=2e-6)
    for name, weight in single_weights[case].items():
        torch.testing.assert_close(first_weights[case][name], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(first_weights[case][name], second_weights[case][name])


def test_the_weights_were_sharded(runs):
    assert not any(runs[1][0][0]["sharded"].values())
    assert all(sharded for rank in range(2) for sharded in runs[2][rank][0]["sharded"].values())


def test_a_loss_with_state_continues_from_a_sharded_checkpoint(runs):
    first, second = (runs[2][rank][0]["resumed"] for rank in range(2))
    assert len(first["whole"]["logs"]) == 2
    for ours, theirs in zip(first["resumed"]["logs"], first["whole"]["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert first["whole"]["state"] == second["whole"]["state"]
    assert first["resumed"]["state"].keys() == first["whole"]["state"].keys()
    weights = [entry["pref_weight"] for entry in first["whole"]["logs"]]
    assert weights[0] != weights[1]


def test_so_it_does_where_each_rank_saves_its_own_shards(runs, dense_model, tmp_path):
    words = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
    (first, _), _ = launch(2, dense_model, tmp_path / "sharded", *words)
    assert list((tmp_path / "sharded" / "whole" / "checkpoint-2").glob("pytorch_model_fsdp_*"))
    for ours, theirs in zip(first["resumed"]["resumed"]["logs"], first["resumed"]["whole"]["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert first["resumed"]["whole"]["logs"] == runs[2][0][0]["resumed"]["whole"]["logs"]


def test_learned_weights_are_refused_under_fsdp(runs):
    refused = runs[2][0][0]["resumed"]["refused"]
    assert "learns rule.log_variances" in refused and "FSDP" in refused
