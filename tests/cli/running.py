"""The command, run in this process or in one of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_custom_losses.cli import main

ROOT = Path(__file__).parents[2]

GOOD = """
import torch.nn.functional as F

from trl_custom_losses import LossFunctionRegistry, PreferenceBatch, PreferenceLoss


@LossFunctionRegistry.register("{name}_registered")
def registered(batch: PreferenceBatch, outputs, *, beta: float = 2.0):
    chosen, rejected = (beta * outputs.mean_logps).chunk(2)
    return -F.logsigmoid(chosen - rejected), {{}}


class Defined(PreferenceLoss):
    def forward(self, batch, model_outputs):
        return -model_outputs.mean_logps.chunk(2)[0], {{}}


class _Helper(PreferenceLoss):
    def forward(self, batch, model_outputs):
        raise RuntimeError("not a loss of its own")


def helper(values):
    return values
"""

BAD = """
from trl_custom_losses import PreferenceBatch


def attached(batch: PreferenceBatch, outputs, *, beta: float = 2.0):
    chosen = beta * outputs.mean_logps.chunk(2)[0]
    return -chosen, {"chosen": chosen.mean()}
"""


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What stdout holds, all of it."""
        return json.loads(self.out)


def run(*words: str | Path) -> Done:
    """Run the command in this process, its output in a pipe."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def launch(
    *words: str | Path, cwd: Path, program: str | None = None, launcher: Sequence[str] = (), **environment: str
) -> Done:
    """Run the command, or a program in its place, in a process of its own that a launcher may start."""
    start = [*launcher, "-m", "trl_custom_losses"] if program is None else ["-c", program]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *start, *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)
