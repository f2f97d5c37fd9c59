"""Losses that tests of composite losses compose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.example_losses import restored_registry
from trl_custom_losses import LossFunctionRegistry

from .dynamic import Renaming, Reporting


@pytest.fixture
def reporting() -> Iterator[None]:
    """Losses that report metrics, under their names."""
    with restored_registry():
        LossFunctionRegistry.register("reporting")(Reporting)
        LossFunctionRegistry.register("renaming")(Renaming)
        yield
