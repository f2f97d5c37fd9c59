"""Metrics for what was trained, as modules of the `evaluate` library.

    from trl_custom_losses import metrics

    metrics.load("preference_accuracy").compute(margins=[0.3, -0.1])

Each is a file `metrics/<name>/<name>.py` that `evaluate.load` reads by its path too, without a network. The arithmetic
is plain numpy in double precision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import LossConfigError
from ..hyperparameters import suggestion

if TYPE_CHECKING:
    import evaluate

_NAMES = ("completion_length", "diversity", "preference_accuracy", "verifiable_accuracy")


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return _NAMES


def load(name: str) -> evaluate.Metric:
    """The metric of that name.

    The class is taken from the package and its data stay in memory, so that any number of processes can load and
    compute at the same time: `evaluate.load` copies the file into a shared folder of modules first, and its metrics
    write their inputs to a shared folder.

    Raises:
        LossConfigError: There is no such metric; the message lists the nearest names.
    """
    if name not in _NAMES:
        raise LossConfigError(
            f"there is no metric named '{name}'{suggestion(name, _NAMES)}; known: {', '.join(_NAMES)}"
        )
    module = importlib.import_module(f"{__name__}.{name}.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))(keep_in_memory=True)
