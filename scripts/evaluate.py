"""Compare a base model with what was trained from it: checkpoints or adapters, any number.

    python scripts/evaluate.py --base MODEL --trained ADAPTER CHECKPOINT --pairs pairs.jsonl --output outputs/evaluation
    python scripts/evaluate.py --base MODEL --trained ADAPTER --prompts prompts.jsonl --reward my_rewards:exact

On pairs: how often the chosen completion is likelier, plainly and by length, and the accuracy, margin and calibration
of the implicit reward against the base. On prompts: how often sampled completions are right, how diverse and how long
they are. Prints tables with paired differences to the base and writes results.json. Run with --help for all arguments.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def _give_way() -> None:
    """Put the installed package `evaluate` where this file was imported in its place.

    `python scripts/ANY.py` looks for modules in this folder first, so `import evaluate`, in the package's metrics or in
    a user's reward function, finds this file.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _FOLDER]
    spec = PathFinder.find_spec("evaluate", elsewhere)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'evaluate'", name="evaluate")
    package = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = package  # what the import statement under way returns
    spec.loader.exec_module(package)


if __name__ == "evaluate":
    _give_way()
else:
    from trl_custom_losses.evaluation.command import main
    from trl_custom_losses.trainers.launch import exit_with_message

    if __name__ == "__main__":
        exit_with_message(main)
