"""The checks, a file for each kind; importing this package fills `CHECKS`."""

from __future__ import annotations

from . import returns  # isort: skip
from . import running  # isort: skip
from . import gradients  # isort: skip
from . import invariances  # isort: skip
from . import numerics  # isort: skip
from . import building  # isort: skip

__all__ = ["building", "gradients", "invariances", "numerics", "returns", "running"]
