"""Losses that tests of gradient balancing compose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.example_losses import restored_registry
from trl_custom_losses import LossFunctionRegistry

from .compositions import Constant, Everywhere, Reading


@pytest.fixture
def registered() -> Iterator[None]:
    """The losses of `compositions` under their names."""
    with restored_registry():
        for name, loss in {"reading": Reading, "everywhere": Everywhere, "constant": Constant}.items():
            LossFunctionRegistry.register(name)(loss)
        yield
