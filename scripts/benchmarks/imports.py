"""Seconds until the package, its trainers and its command line are there, and those of one test of a loss."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .measure import alternate, compare, summary

_ROOT = Path(__file__).parents[2]

#: What is started -> the arguments of Python.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "import torch": ("-c", "import torch"),
    "import trl_custom_losses": ("-c", "import trl_custom_losses"),
    "from trl import DPOTrainer, GRPOTrainer": ("-c", "from trl import DPOTrainer, GRPOTrainer"),
    "from trl_custom_losses import CustomDPOTrainer, CustomGRPOTrainer": (
        "-c",
        "from trl_custom_losses import CustomDPOTrainer, CustomGRPOTrainer",
    ),
    "trl-custom-losses list": ("-m", "trl_custom_losses", "list"),
    "pytest tests/losses/preference/test_hinge.py": ("-m", "pytest", "-q", "tests/losses/preference/test_hinge.py"),
}
#: What is compared: ours -> peer.
_PEERS = {
    "import trl_custom_losses": "import torch",
    "from trl_custom_losses import CustomDPOTrainer, CustomGRPOTrainer": "from trl import DPOTrainer, GRPOTrainer",
    "trl-custom-losses list": "import torch",
    "pytest tests/losses/preference/test_hinge.py": "import torch",
}
_LISTED = 5
#: A line of `-X importtime`: microseconds of the module alone and with what it imports, its depth, its name.
_LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \| ( *)(\S+)")


def run(rounds: int, commands: Sequence[str] = tuple(_COMMANDS)) -> dict[str, Any]:
    """Seconds of fresh processes, taken alternately, and what importing the package consists of.

    Args:
        rounds: Processes of each command.
        commands: Which of them to measure.
    """
    for command in commands:
        _seconds(command)  # files are read from the disk once
    samples = alternate({command: partial(_seconds, command) for command in commands}, rounds)
    found: dict[str, Any] = {command: {"seconds": summary(values)} for command, values in samples.items()}
    for ours, peer in _PEERS.items():
        if ours in samples and peer in samples:
            found[ours] |= {"peer": peer, "ratio": compare(samples, ours, peer)}
            beyond = [mine - theirs for mine, theirs in zip(samples[ours], samples[peer], strict=True)]
            found[ours]["seconds_beyond_peer"] = summary(beyond)
    return {"commands": found, "largest": largest_imports()}


def largest_imports() -> dict[str, Any]:
    """Milliseconds that importing the package adds to importing torch, by module; measured once, by Python itself.

    Modules of ours count alone; any other, with all that it imports, counts where a module of ours is the first to ask.
    """
    lines = _imports("import torch; import trl_custom_losses")
    at = next(index for index, (_, _, depth, name) in enumerate(lines) if name == "torch" and depth == 0)
    own: dict[str, float] = {}
    asked: dict[str, float] = {}
    path: list[str] = []
    for alone, whole, depth, name in reversed(lines[at + 1 :]):  # a module stands after what it imports
        path[depth:] = [name]
        parent = path[depth - 1] if depth else ""
        if name.split(".")[0] == "trl_custom_losses":
            own[name] = alone / 1e3
        elif parent.split(".")[0] == "trl_custom_losses":
            asked[name] = whole / 1e3
    return {
        "trl_custom_losses, milliseconds": sum(own.values()) + sum(asked.values()),
        "its own modules": len(own),
        "largest own": _first(own),
        "largest asked for": _first(asked),
    }


def table(result: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of what `run` returned, the first of them its head."""
    rows = [["", "seconds", "beside", "seconds beyond it", "ratio"]]
    for command, figures in result["commands"].items():
        rows.append([command, _interval(figures["seconds"], 2), figures.get("peer", ""), "", ""])
        if "peer" in figures:
            rows[-1][3:] = [_interval(figures["seconds_beyond_peer"], 2), _interval(figures["ratio"], 3)]
    return rows


def _interval(figures: dict[str, float], digits: int) -> str:
    middle, low, high = (figures[key] for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _first(milliseconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1])[:_LISTED])


def _seconds(command: str) -> float:
    start = time.perf_counter()
    _python(*_COMMANDS[command])
    return time.perf_counter() - start


def _imports(statement: str) -> list[tuple[int, int, int, str]]:
    """Of each module, in the order in which their imports ended: microseconds alone and whole, depth, name."""
    found = []
    for line in _python("-X", "importtime", "-c", statement).stderr.splitlines():
        if match := _LINE.match(line):
            alone, whole, indent, name = match.groups()
            found.append((int(alone), int(whole), len(indent) // 2, name))
    return found


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=_ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done
