"""The arrows between the modules point one way, and only the trainers touch TRL."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_custom_losses

_PACKAGE = Path(trl_custom_losses.__file__).parent
_NAME = _PACKAGE.name

# From the bottom up; a module may import from its own room and from rooms before it. A new one is added here.
_ROOMS = [
    "errors",
    "fields",
    "types",
    "summaries",
    "reductions",
    "hyperparameters",
    "schedules",
    "state",
    "base",
    "foreign",
    "adapters",
    "scheduling",
    "registry",
    "balancing",
    "composition",
    "losses",
    "cards",
    "testing",
    "plotting",
    "callbacks",
    "metrics",
    "rewards",
    "trainers",
    "evaluation",
    "cli",
    "__main__",
]
_FRAMEWORKS = {"trl", "transformers", "accelerate", "datasets", "peft"}
_FAMILIES = {"preference", "policy"}
_OUTER = ("callbacks", "trainers", "evaluation")


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        parts = path.relative_to(_PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, *, at_run_time: bool = True) -> set[str]:
    """Absolute names that a module imports, by statements anywhere in it; not those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    package = [_NAME, *path.relative_to(_PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def _room(name: str) -> str:
    """The room of an absolute name inside the package; empty for what the package itself exports."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in _ROOMS else ""


_INNER = {name: path for name, path in _modules().items() if name.split(".")[0] in _ROOMS}


def test_the_reader_sees_the_imports() -> None:
    names = _imports(_PACKAGE / "losses" / "policy" / "grpo.py")
    assert {"torch", f"{_NAME}.registry.LossFunctionRegistry", f"{_NAME}.losses.policy.importance.clip_bounds"} <= names
    assert f"{_NAME}.base.Loss" not in _imports(_PACKAGE / "reductions.py")
    assert f"{_NAME}.base.Loss" in _imports(_PACKAGE / "reductions.py", at_run_time=False)
    assert len(_INNER) > 40


def test_every_module_has_a_room() -> None:
    assert not [name for name in _modules() if name and name not in _INNER]
    assert {name.split(".")[0] for name in _INNER} == set(_ROOMS)


@pytest.mark.parametrize("name", _INNER)
def test_imports_come_from_the_same_room_or_below(name: str) -> None:
    own = _ROOMS.index(name.split(".")[0])
    for imported in _imports(_INNER[name]):
        if imported.split(".")[0] != _NAME:
            continue
        assert _room(imported), f"{name} imports {imported}: import from the module that defines it"
        assert _ROOMS.index(_room(imported)) <= own, f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in _modules() if name.split(".")[0] not in _OUTER])
def test_only_the_outer_rooms_import_the_frameworks(name: str) -> None:
    found = {imported.split(".")[0] for imported in _imports(_modules()[name], at_run_time=False)}
    if name.startswith("metrics."):  # `evaluate` describes the inputs of a metric by types of `datasets`
        found -= {"datasets"}
    assert not found & _FRAMEWORKS, f"{name} imports {found & _FRAMEWORKS}"


@pytest.mark.parametrize("name", [name for name in _modules() if name.split(".")[0] not in ("trainers", "evaluation")])
def test_trl_is_imported_by_trainers_and_evaluation_alone(name: str) -> None:
    assert "trl" not in {imported.split(".")[0] for imported in _imports(_modules()[name], at_run_time=False)}


@pytest.mark.parametrize("name", [name for name in _INNER if name.startswith(("losses.preference", "losses.policy"))])
def test_families_do_not_import_each_other(name: str) -> None:
    own = name.split(".")[1]
    others = [f"{_NAME}.losses.{family}." for family in _FAMILIES - {own}]
    assert not [imported for imported in _imports(_INNER[name]) if imported.startswith(tuple(others))]


def test_every_loss_is_in_its_index() -> None:
    for family in (*_FAMILIES, "auxiliary", "composite"):
        index = _imports(_PACKAGE / "losses" / family / "__init__.py")
        modules = {path.stem for path in (_PACKAGE / "losses" / family).glob("*.py")} - {"__init__"}
        indexed = {name.split(".")[3] for name in index if name.startswith(f"{_NAME}.losses.{family}.")}
        shared = {"log_ratio", "score_difference", "wrapped_base", "importance", "pair_halves", "similarity"}
        assert modules - shared <= indexed


def test_losses_run_without_the_frameworks() -> None:
    """Importing the package, listing and building losses load neither trl nor what it stands on."""
    program = f"""
import sys
import trl_custom_losses as package
names = package.LossFunctionRegistry.names()
assert "sigmoid" in names and "grpo" in names, names
package.LossFunctionRegistry.build({{"type": "composed", "components": [{{"type": "sigmoid"}}]}})
assert set(package.__all__) <= set(dir(package))
for name in set(package.__all__) - set(package._TRAINERS):
    getattr(package, name)
loaded = sorted(set(sys.modules) & {_FRAMEWORKS!r})
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = trl_custom_losses.NoSuchName
