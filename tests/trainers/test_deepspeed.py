"""Losses with state under DeepSpeed: two real processes on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("deepspeed")

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", [2, 3])
def test_state_is_saved_and_continues_under_zero(stage, tmp_path, dense_model):
    config = tmp_path / "accelerate.yaml"
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": stage, "offload_optimizer_device": "none", "zero3_init_flag": False},
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": 0,
        "use_cpu": False,
    }
    config.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    worker = str(ROOT / "tests" / "trainers" / "deepspeed_worker.py")
    done = subprocess.run(
        [*launcher, worker, str(dense_model), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # the first run on a machine compiles for minutes
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["whole"] == first["resumed"] and len(first["whole"]["logs"]) == 2
    assert first["whole"]["state"] == second["whole"]["state"]
    weights = [entry["pref_weight"] for entry in first["whole"]["logs"]]
    assert weights[0] != weights[1]
    assert "learns rule.log_variances" in first["refused"] and "DEEPSPEED" in first["refused"]
