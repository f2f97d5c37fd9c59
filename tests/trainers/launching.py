"""Starts a module of the tests in one process, or in two under DDP or DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("single", "ddp", "zero2", "zero3")


def world_size(launcher: str) -> int:
    """How many processes a launcher starts."""
    return 1 if launcher == "single" else 2


def launch(launcher: str, module: str, *arguments: object, folder: Path, timeout: float = 900) -> None:
    """Run `python -m module *arguments` under a launcher; fails with the end of what it wrote to stderr.

    Args:
        launcher: One of `LAUNCHERS`; all but the first start two processes on CPUs.
        module: Dotted name, importable from the repository's root.
        *arguments: Words of the command line.
        folder: Where DeepSpeed's configuration is written.
        timeout: Seconds. DeepSpeed's first run on a machine compiles for minutes.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if launcher == "single":
        program = [sys.executable]
    elif launcher == "ddp":
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        config = folder / f"{launcher}.yaml"
        config.write_text(yaml.safe_dump(_deepspeed(int(launcher.removeprefix("zero")))))
        program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        environment["DS_ACCELERATOR"] = "cpu"
    command = [*program, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]


def _deepspeed(stage: int) -> dict[str, object]:
    """A configuration of accelerate for ZeRO of a stage on two CPU processes."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": stage, "offload_optimizer_device": "none", "zero3_init_flag": False},
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": 0,
        "use_cpu": False,
    }
