"""`new`: a loss and its test, from a template."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LossConfigError
from ..registry import LossFunctionRegistry
from .options import FamilyName, FormName

_EXAMPLES = {"preference": ("dpo", "beta: 0.1, target: 0.5"), "policy": ("grpo", "sharpness: 2.0")}


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the loss, and of its file.")],
    family: Annotated[FamilyName, typer.Option(help="preference for DPO, policy for GRPO.")],
    form: Annotated[FormName, typer.Option(help="A function, or a class with room for state.")] = FormName.function,
    folder: Annotated[Path, typer.Option(help="Where to write; made if it is not there.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a loss of your own, and its test.

    A start that works, to be changed: NAME.py holds a registered loss, test_NAME.py the conformance kit and a value by
    hand.
    """
    sources = rendered(name, family.value, form.value)
    paths = {folder / file: source for file, source in sources.items()}
    _check_free(name, folder / f"{name}.py")
    there = [path for path in paths if path.exists()]
    if there and not force:
        raise LossConfigError(f"{' and '.join(map(str, there))} exist already: choose another name, or --force")
    if folder.exists() and not folder.is_dir():
        raise LossConfigError(f"could not write to {folder}, which is a file: give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, source in paths.items():
            path.write_text(source, encoding="utf-8")
    except OSError as error:
        raise LossConfigError(f"could not write to {folder}: {error}") from error
    loss, test = map(str, paths)
    command, values = _EXAMPLES[family.value]
    attribute = name if form is FormName.function else class_name(name)
    here = "" if folder.resolve() == Path.cwd() else f", run from {folder}"
    typer.echo(
        f"Wrote {loss} and {test}. Next:\n\n"
        f"  trl-custom-losses check {loss}\n"
        f"  pytest {test}\n\n"
        f"In a config of `trl-custom-losses {command}`{here}:\n\n"
        f'  loss_function: {{type: "{name}:{attribute}", {values}}}'
    )


def rendered(name: str, family: str, form: str) -> dict[str, str]:
    """The sources by file name.

    Raises:
        LossConfigError: No loss can have that name.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise LossConfigError(f"a loss is named by letters, digits and underscores, such as 'my_loss', found {name!r}")
    if keyword.iskeyword(name):
        raise LossConfigError(f"'{name}' is a keyword of Python: choose another name")
    if name == "conftest" or name.startswith("test_"):
        raise LossConfigError(f"pytest would take '{name}', the file or the loss, for its own: choose another name")
    source, test = _template(f"{family}_{form}"), _template(f"{family}_test")
    if name in _names_in(source):
        raise LossConfigError(f"'{name}' means something else in the loss's own code: choose another name")
    attribute = name if form == "function" else class_name(name)
    test = test.replace("my_loss:my_loss", f"my_loss:{attribute}")
    return {
        f"{name}.py": source.replace("MyLoss", class_name(name)).replace("my_loss", name),
        f"test_{name}.py": test.replace("my_loss", name),
    }


def class_name(name: str) -> str:
    """The name in capitals: my_loss becomes MyLoss, focal FocalLoss."""
    words = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    return words if words.endswith("Loss") else f"{words}Loss"


def _template(name: str) -> str:
    return files(__package__).joinpath("templates", f"{name}.py.txt").read_text(encoding="utf-8")


def _names_in(source: str) -> set[str]:
    """Names that a source uses, imports or gives to arguments."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def _check_free(name: str, path: Path) -> None:
    """Refuse a name that the registry has or that imports another module."""
    if name in LossFunctionRegistry.names():
        raise LossConfigError(f"there is a loss named '{name}' already: choose another name")
    found = importlib.util.find_spec(name)
    if found is not None and not (found.origin and path.exists() and Path(found.origin).samefile(path)):
        raise LossConfigError(
            f"'{name}' is a module already ({found.origin or 'a folder'}), which would be imported in place of "
            f"{path}: choose another name"
        )
