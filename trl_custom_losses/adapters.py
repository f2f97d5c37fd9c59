"""From whatever a user hands over (class, function, import path, foreign object) to a loss class, and what such a loss
declares about itself checked."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from .base import Loss, LossFunction, PolicyLoss, PreferenceLoss
from .errors import LossConfigError
from .foreign import FunctionLoss, ObjectLoss, annotated_family
from .hyperparameters import hyperparameters_of, suggestion
from .reductions import REDUCTIONS
from .types import REQUIREMENTS, Family

# What a loss may declare about itself: the annotated attributes of `Loss` that the registry does not set.
_FACTS = tuple(fact for fact in vars(Loss)["__annotations__"] if fact not in ("name", "origins", "schedules"))

_CHOICES = {
    "pair_weighting": ("pair", "mean"),
    "f_divergence": ("hyperparameter", "independent", "unsupported"),
}

#: Containers within containers that a configuration may hold, and values in all: a list may have one for every entry of
#: a vocabulary. Of containers, each of which may become a loss, there are fewer.
_DEEPEST, _MOST_VALUES, _MOST_CONTAINERS = 60, 1_000_000, 10_000

_IMPORT_PATH = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def check_readable(config: Any) -> None:
    """Refuse what no other check could walk through or print: endless or immense configurations and numbers.

    Raises:
        LossConfigError: The configuration is nested too deep, as one that contains itself, or holds too many values, or
            a whole number is beyond 64 bits; the message begins with the field and its path.
    """
    left, seen, containers = [("loss_function", "loss_function", config, 0)], 0, 0
    while left:
        field, path, value, depth = left.pop()
        where = f"'{field}' (`{path}`)"
        seen += 1
        if isinstance(value, int) and abs(value) >= 2**63:
            digits = math.ceil(value.bit_length() * math.log10(2))  # printing thousands of them raises
            raise LossConfigError(f"{where}: expected a number within 64 bits, found one of about {digits} digits")
        if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
            continue
        if depth == _DEEPEST:
            raise LossConfigError(f"{where}: a configuration nests at most {_DEEPEST} levels; it may contain itself")
        containers += 1
        if seen + len(value) > _MOST_VALUES or containers > _MOST_CONTAINERS:
            raise LossConfigError(
                f"{where}: a configuration holds at most {_MOST_VALUES} values and {_MOST_CONTAINERS} lists and dicts, "
                "found more"
            )
        if isinstance(value, Mapping):
            left += [(field, f"{path}, a key", key, depth + 1) for key in value if not isinstance(key, str)]
            left += [(key, f"{path}.{key}", item, depth + 1) for key, item in value.items() if isinstance(key, str)]
        else:
            left += [(field, f"{path}[{number}]", item, depth + 1) for number, item in enumerate(value)]


def import_loss(path: str) -> Any:
    """What the import path `package.module:attribute` names.

    Raises:
        LossConfigError: The module cannot be imported or lacks the attribute.
    """
    if not _IMPORT_PATH.match(path):
        raise LossConfigError(f"an import path looks like 'package.module:Loss', found {path!r}")
    module_name, attribute = path.split(":")
    module = import_users_module(module_name, f"for {path!r}")
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise LossConfigError(f"module '{module_name}' has no '{attribute}'{suggestion(part, names)} for {path!r}")
        found = getattr(found, part)
    return found


def import_users_module(name: str, purpose: str) -> ModuleType:
    """The module that a user named.

    Args:
        name: Absolute, with dots.
        purpose: What it is imported for, for the message.

    Raises:
        LossConfigError: It cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        raise LossConfigError(f"could not import '{name}' {purpose}: {type(error).__name__}: {error}") from error


def look_in(folder: str) -> None:
    """Let import paths name modules in `folder`, which is searched last, so that no file there takes the place of a
    library."""
    if folder not in sys.path:
        sys.path.append(folder)


def as_loss_class(loss: Any, facts: Mapping[str, Any], name: str, family: Family | None = None) -> type[Loss]:
    """The class that `build` instantiates for a loss class, a function or any class with `__call__`."""
    facts = dict(facts)
    unknown = [fact for fact in facts if fact not in _FACTS]
    if unknown:
        raise LossConfigError(f"loss '{name}': unknown facts {unknown}; a loss may declare the attributes of `Loss`")
    if loss in (LossFunction, Loss, PreferenceLoss, PolicyLoss, FunctionLoss, ObjectLoss):
        raise LossConfigError(f"loss '{name}': {loss.__name__} is a base class, not a loss")
    if inspect.isclass(loss) and issubclass(loss, Loss):
        if facts:
            raise LossConfigError(f"loss '{name}': declare {sorted(facts)} as class attributes of {loss.__name__}")
        return loss
    if inspect.isclass(loss) and any("__call__" in vars(base) for base in loss.__mro__):
        facts = facts_of(loss) | facts
        facts.setdefault("family", family)
        return ObjectLoss.wrap(loss, facts)
    if callable(loss) and not inspect.isclass(loss):
        facts.setdefault("family", annotated_family(loss) or getattr(loss, "family", None) or family)
        if facts["family"] is None:
            raise LossConfigError(
                f"loss '{name}': say which family the function belongs to, `register('{name}', family='preference')` "
                "or 'policy', or annotate its first argument as PreferenceBatch or PolicyBatch"
            )
        # Hyperparameters become attributes of the loss object.
        taken = [hyperparameter for hyperparameter in hyperparameters_of(loss) if hasattr(FunctionLoss, hyperparameter)]
        if taken:
            raise LossConfigError(f"loss '{name}': a hyperparameter cannot be called {taken[0]!r}; rename it")
        return FunctionLoss.wrap(loss, facts)
    raise LossConfigError(f"loss '{name}' must be a class or a function `f(batch, outputs, *, ...)`, found {loss!r}")


def facts_of(loss: Any) -> dict[str, Any]:
    """What a class or object that does not inherit from `Loss` declares about itself."""
    return {fact: getattr(loss, fact) for fact in _FACTS if hasattr(loss, fact)}


def check_facts(loss: Loss) -> None:
    """Reject what a loss declares about itself and the framework does not know."""
    if loss.family not in REQUIREMENTS:
        raise LossConfigError(f"loss '{loss.name}': `family` must be 'preference' or 'policy', found {loss.family!r}")
    if loss.family == "preference" and hasattr(loss, "prepare") and not loss.composite:
        raise LossConfigError(f"loss '{loss.name}' defines `prepare`, which only policy losses have")
    known = REQUIREMENTS[loss.family]
    for fact in ("requires", "columns"):
        names = getattr(loss, fact)
        if not isinstance(names, (set, frozenset, tuple, list)) or not all(isinstance(name, str) for name in names):
            raise LossConfigError(f"loss '{loss.name}': `{fact}` is a collection of names, found {names!r}")
    for column, (_, path) in loss.column_scorers.items():
        where = f"loss '{loss.name}', scorer of the column '{column}'"
        try:
            scorer = import_loss(path)
        except LossConfigError as error:
            raise LossConfigError(f"{where}: {error}") from error
        if not callable(scorer):
            raise LossConfigError(f"{where}: expected a function, found {scorer!r} under {path!r}")
    for name in loss.requires:
        if name not in known:
            raise LossConfigError(
                f"loss '{loss.name}' requires '{name}', which a {loss.family} trainer cannot compute"
                f"{suggestion(name, known)}; it can compute {', '.join(sorted(known))}"
            )
    for fact, choices in _CHOICES.items():
        if getattr(loss, fact) not in choices:
            raise LossConfigError(
                f"loss '{loss.name}': `{fact}` is one of {', '.join(choices)}; found {getattr(loss, fact)!r}"
            )
    if not callable(loss.reduction) and loss.reduction not in REDUCTIONS:
        raise LossConfigError(
            f"loss '{loss.name}': unknown reduction {loss.reduction!r}{suggestion(str(loss.reduction), REDUCTIONS)}; "
            f"there are {', '.join(REDUCTIONS)}"
        )
