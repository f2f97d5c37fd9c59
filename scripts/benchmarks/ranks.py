"""Two processes under DDP on the CPU: collectives and host syncs counted, and step times, ours against TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import interval, milliseconds

_SCRIPTS = Path(__file__).parent.parent
#: A loss that observes nothing, and one that adapts to what it observes on all ranks.
_LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"ours": "sigmoid", "ours, adaptive": {"type": "adaptive_dpo", "strategy": "margin"}},
    "grpo": {
        "ours": "grpo",
        "ours, adaptive": {
            "type": "composed",
            "components": [{"type": "grpo", "name": "a"}, {"type": "bnpo", "name": "b"}],
            "balancing": "upgrad",
        },
    },
}


def counts(steps: int, accumulations: Sequence[int] = (1, 8), logging: Sequence[int] = (1000, 1)) -> dict[str, Any]:
    """Per optimizer step: collectives beyond the gradient's own, and host syncs.

    Args:
        steps: Optimizer steps to count over.
        accumulations: Micro-batches of an optimizer step.
        logging: Values of `logging_steps`; at 1000 nothing logs, at 1 every step does.
    """
    cases = {
        f"{trainer}, accumulation {accumulation}, {'logging' if logging_steps == 1 else 'not logging'}": {
            "measure": "counts",
            "trainer": trainer,
            "losses": _LOSSES[trainer],
            "accumulation": accumulation,
            "logging_steps": logging_steps,
            "steps": steps,
            "model": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64},
        }
        for trainer in _LOSSES
        for accumulation in accumulations
        for logging_steps in logging
    }
    return dict(zip(cases, _launch(list(cases.values())), strict=True))


def times(rounds: int, steps: int) -> dict[str, Any]:
    """Step times in seconds of both trainers, on rank 0."""
    settings = {"measure": "times", "accumulation": 1, "logging_steps": 10, "steps": steps, "rounds": rounds}
    cases = [settings | {"trainer": trainer, "losses": {"ours": losses["ours"]}} for trainer, losses in _LOSSES.items()]
    return dict(zip(_LOSSES, _launch(cases), strict=True))


def _launch(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "found.json")
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*program, "-m", "benchmarks.worker", str(output), json.dumps(settings)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=_SCRIPTS, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        return json.loads(output.read_text())


def counts_table(found: dict[str, Any]) -> list[list[str]]:
    """Rows for a table of what `counts` found."""
    rows = [["case", "trainer", "collectives", "of these ours", "host syncs", "of these ours", "event waits of ours"]]
    for case, contenders in found.items():
        for name, counted in contenders.items():
            cells = []
            for kind in ("collectives", "host_syncs"):
                cells += [counted[kind]["total"], counted[kind]["by_package"].get("trl_custom_losses", 0)]
            rows.append([case, name, *(f"{number:g}" for number in (*cells, counted["event_waits"]))])
    return rows


def times_table(found: dict[str, Any]) -> list[list[str]]:
    """Rows for a table of what `times` found."""
    rows = [["trainer", "TRL, ms", "ours, ms", "ours/TRL"]]
    for name, result in found.items():
        rows.append([name, milliseconds(result["trl"]), milliseconds(result["ours"]), interval(result["ratio"])])
    return rows
