"""A short form of scripts/kill_and_resume.py: real kills of a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.kill_and_resume import differences, finished_steps, unfinished_steps

ROOT = Path(__file__).parents[1]


@pytest.mark.distributed
@pytest.mark.parametrize("trainer, processes", [("dpo", 1), ("grpo", 2)])
def test_killed_runs_end_as_if_nothing_had_happened(trainer, processes, tmp_path):
    script = str(ROOT / "scripts" / "kill_and_resume.py")
    words = ["--kills", "2", "--trainer", trainer, "--processes", str(processes), "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads((tmp_path / f"{trainer}-{processes}" / "results.json").read_text())
    assert results["different"] == []
    assert [kill["number"] for kill in results["kills"]] == [1, 2]
    last = results["kills"][-1]
    assert (last["step"] > 0 or last["unfinished"]) and last["step"] < results["steps"]
    assert "bit for bit" in done.stdout


def end(folder: Path, weight: float = 1.0, state: float = 2.0, loss: float = 3.0, moment: float = 4.0) -> Path:
    """The files that the script compares, with given values."""
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    save_file({"w": torch.tensor([weight, 0.0])}, folder / "model.safetensors")
    save_file({"s": torch.tensor(state)}, checkpoint / "loss_function.safetensors")
    moments = {"state": {0: {"exp_avg": torch.tensor([moment])}}, "param_groups": []}
    torch.save(moments, checkpoint / "optimizer.pt")
    log = [{"step": 5, "loss": loss, "step_time": weight, "num_tokens": weight}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_every_difference_is_found(tmp_path):
    alone = end(tmp_path / "alone")
    assert differences(alone, end(tmp_path / "same"), 5) == []
    assert differences(alone, end(tmp_path / "w", weight=1.0 + 1e-7), 5) == ["model.safetensors: w"]
    assert differences(alone, end(tmp_path / "s", state=2.5), 5) == ["checkpoint-5/loss_function.safetensors: s"]
    moved = end(tmp_path / "o", moment=4.5)
    assert differences(alone, moved, 5) == ["checkpoint-5/optimizer.pt: exp_avg of 0"]
    assert differences(alone, end(tmp_path / "l", loss=3.5), 5) == ["logged loss of step 5"]


def test_finished_and_unfinished_checkpoints_are_told_apart(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "checkpoint_files.json").touch()
    writing = tmp_path / "_unfinished" / "checkpoint-10"
    writing.mkdir(parents=True)
    assert finished_steps(tmp_path) == [9] and unfinished_steps(tmp_path) == [10]
    assert unfinished_steps(tmp_path, since=writing.stat().st_mtime + 1) == []
