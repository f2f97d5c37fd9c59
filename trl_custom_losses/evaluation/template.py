"""Arguments of the chat template, for all rows and for one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import LossConfigError

#: The column from which TRL's DPO reads a row's own arguments.
TEMPLATE_COLUMN = "chat_template_kwargs"


def read_template_options(text: str) -> dict[str, Any]:
    """The arguments written as a JSON object.

    Raises:
        LossConfigError: It is something else.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise LossConfigError(f"`{TEMPLATE_COLUMN}` must be a JSON object, not {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise LossConfigError(f"`{TEMPLATE_COLUMN}` must be a JSON object, not {text!r}")
    return options


def template_options(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template gets for a row: the defaults, and before them what its column holds.

    Args:
        row: One example. A None in its column is what `datasets` puts where other rows have a key and this one has not.
        defaults: For all rows.
    """
    own = row.get(TEMPLATE_COLUMN) or {}
    return dict(defaults) | {name: value for name, value in own.items() if value is not None}
