"""Losses with one mistake each, under the check that must find it."""

from __future__ import annotations

from .base import Cases, Right, RightPolicy
from .building import BUILDING
from .gradients import GRADIENTS
from .invariances import INVARIANCES
from .numerics import NUMERICS
from .returns import RETURNS
from .running import RUNNING
from .sharing import SHARING

#: By check: losses (classes, configs or objects) that it must find, and words that its message must have.
BROKEN: Cases = RETURNS | RUNNING | GRADIENTS | INVARIANCES | SHARING | NUMERICS | BUILDING

__all__ = ["BROKEN", "Right", "RightPolicy"]
