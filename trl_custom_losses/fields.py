"""Optional fields of the types that losses see: reading one that is absent explains why."""

from __future__ import annotations

import inspect
from dataclasses import field
from typing import Any, Self

from torch import Tensor

from .errors import MissingFieldError


def optional() -> Any:
    """A dataclass field that need not be given; absent, it is no attribute at all."""
    # A default factory leaves no class attribute behind, so that an absent field reaches `__getattr__`.
    return field(default_factory=lambda: None)


class ExplainsMissingFields:
    """Reading an absent optional field says so, instead of handing the loss a None that fails somewhere else."""

    def __post_init__(self) -> None:
        for name in [name for name, value in vars(self).items() if value is None]:
            delattr(self, name)

    def __getattr__(self, name: str) -> Any:
        found = inspect.getattr_static(type(self), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)  # once more, for the message about the field that it lacks
        raise MissingFieldError(
            f"`{type(self).__name__}` has no `{name}` here. If it is a field of this type, the loss must declare it "
            f"(`requires = {{'{name}'}}`, or `columns` for data-set columns) for the trainer to provide it."
        )

    def __repr__(self) -> str:
        parts = (
            f"{name}={tuple(value.shape) if isinstance(value, Tensor) else value!r}"
            for name, value in vars(self).items()
        )
        return f"{type(self).__name__}({', '.join(parts)})"

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (`dataclasses.replace` would read the absent ones)."""
        return type(self)(**{**vars(self), **changes})

    def has(self, name: str) -> bool:
        """Whether the optional field `name` was provided."""
        return name in vars(self)
