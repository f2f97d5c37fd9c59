"""Keeps progress bars and expected warnings out of the tables."""

from __future__ import annotations

import logging
import os
import warnings


def be_quiet() -> None:
    """Errors only, from every package that a benchmark runs."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
