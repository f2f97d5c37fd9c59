"""Fixtures: tiny models saved once a session, and arguments that every tiny run shares.

Nothing of transformers is imported before a test needs it, so that the tests of losses start at once.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


def _save_model(folder: Path, kind: str) -> Path:
    from . import tiny

    gc.freeze()  # `train()` collects garbage, which would walk through all that was imported, every time
    return tiny.save_model(folder / kind, kind=kind)


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a random dense model with its tokenizer."""
    return _save_model(tmp_path_factory.mktemp("models"), "dense")


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a random mixture-of-experts model with its tokenizer."""
    return _save_model(tmp_path_factory.mktemp("models"), "moe")


@pytest.fixture
def run_arguments(tmp_path: Path) -> dict:
    """Arguments of a quiet run on a CPU in float32."""
    from . import tiny

    return tiny.run_arguments(tmp_path / "run")
