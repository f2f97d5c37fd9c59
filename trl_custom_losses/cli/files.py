"""Losses in the working directory and in files."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from ..adapters import import_users_module, look_in
from ..base import Loss
from ..errors import LossConfigError
from ..foreign import annotated_family
from ..registry import LossFunctionRegistry


def look_here() -> None:
    """Let import paths name modules in the working directory."""
    look_in(os.getcwd())


def refuse_paths(name: str, command: str, *, takes_files: bool = False) -> None:
    """Refuse a file or a folder where a loss is named.

    Args:
        name: As given; of a loss, registered or not, in all other cases.
        command: It is given to.
        takes_files: Whether the command takes Python files, which are then no matter of this check.

    Raises:
        LossConfigError: It is that of a file or folder; the message says what to give.
    """
    if not name:
        raise LossConfigError("a loss is named by its registered name or as 'module:loss'; found nothing")
    if ":" in name or name in LossFunctionRegistry.names():
        return
    path = Path(name)
    file = path if path.suffix == ".py" else Path(f"{name}.py")
    is_file = os.path.isfile(file)  # which takes any text, unlike `Path.is_file`
    if takes_files and is_file:
        raise LossConfigError(f"there is no loss named '{name}': did you mean {file}?")
    if path == file or is_file or os.path.exists(path):
        kinds = "a name, 'module:loss' or a Python file" if takes_files else "a name or 'module:loss'"
        found = f"the folder {name}" if os.path.isdir(path) else f"'{name}'"
        hint = f": `trl-custom-losses check {file}` names its losses" if is_file else ""
        raise LossConfigError(f"`{command}` takes {kinds}, found {found}{hint}")


def losses_in(file: Path) -> list[str]:
    """The losses that a Python file registers or defines, by the names that a config would use.

    Registered ones go by their names; others, classes and functions that say their family, by their import paths. Names
    with a leading underscore are left out.

    Raises:
        LossConfigError: There is no such file, it cannot be imported, or it holds no loss.
    """
    module = _imported(file)
    registered = {name: LossFunctionRegistry.get(name) for name in LossFunctionRegistry.names()}
    own = {name: loss for name, loss in registered.items() if loss.__module__ == module.__name__}
    known = {id(part) for loss in own.values() for part in (loss, *_origins(loss))}
    others = [
        f"{module.__name__}:{attribute}"
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and id(value) not in known
        and _is_loss(value)
    ]
    if not own and not others:
        raise LossConfigError(
            f"{file} holds no loss: register one with `@LossFunctionRegistry.register(...)`, inherit from "
            "PreferenceLoss or PolicyLoss, or annotate a function's first argument as PreferenceBatch or PolicyBatch"
        )
    return [*own, *others]


def _imported(file: Path) -> ModuleType:
    if not file.is_file():
        raise LossConfigError(f"there is no file {file}")
    if not re.fullmatch(r"[A-Za-z_]\w*", file.stem):
        raise LossConfigError(f"{file.name} cannot be imported: rename it to letters, digits and underscores")
    look_in(str(file.parent.resolve()))
    module = import_users_module(file.stem, f"from {file}")
    found = getattr(module, "__file__", None)
    if found is None or not Path(found).samefile(file):
        raise LossConfigError(f"the name of {file} is that of another module ({found or 'built in'}): rename the file")
    return module


def _origins(loss: type[Loss]) -> tuple[Any, ...]:
    return getattr(loss, "function", None), getattr(loss, "wrapped", None)


def _is_loss(value: Any) -> bool:
    if inspect.isfunction(value):
        return annotated_family(value) is not None
    if not inspect.isclass(value):
        return False
    if issubclass(value, Loss):
        return any("forward" in vars(base) for base in value.__mro__ if not base.__module__.startswith("trl_custom_"))
    return any("__call__" in vars(base) for base in value.__mro__) and getattr(value, "family", None) is not None
