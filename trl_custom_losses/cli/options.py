"""Arguments that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


class FamilyName(str, Enum):  # noqa: UP042 - what typer prints of it is the value
    """A family of losses, as an argument."""

    preference = "preference"
    policy = "policy"


class FormName(str, Enum):  # noqa: UP042
    """How a loss is written, as an argument."""

    function = "function"
    klass = "class"
