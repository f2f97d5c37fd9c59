"""Loss configurations that are broken in a known way, made by breaking valid ones.

Every maker draws what it needs and returns the broken part with the texts of which the error must hold one: the field
as messages write fields, `'beta'` or `loss_function.beta`, or words about it that no other mistake brings about. Part
of a word would not do: "type" is in "of another type", and a loss's own name begins every message.
"""

from __future__ import annotations

import copy
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

from tests.losses.configs import configs
from trl_custom_losses import LossFunctionRegistry
from trl_custom_losses.hyperparameters import Hyperparameter

Draw = Callable[[st.SearchStrategy], Any]
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Broken:
    """A broken configuration, how it was broken, and texts of which its error must hold one."""

    config: Any
    how: str
    fields: tuple[str, ...]


def written(*fields: Any) -> tuple[str, ...]:
    """How messages write fields: quoted, or in a path."""
    return tuple(text for field in fields for text in (f"'{field}'", repr(field), f".{field}`", f".{field}."))


# Values by what they are; integers of more than 4300 digits have no text in Python.
_VALUES: dict[str, list[Any]] = {
    "none": [None],
    "bool": [True, False],
    "int": [3],
    "float": [0.25],
    "str": ["", "text", "0.5", "1e-3", "null", "ünïcödé \u2603", "\ud800", "x" * 300, "a\nb"],
    "list": [[], [0.1], [[]], ["sigmoid"]],
    "tuple": [(), (0.1,)],
    "dict": [{}, {"value": 1}, {"type": None}, {1: 2}, {"": ""}],
    "other": [math.nan, math.inf, -math.inf, 2**63, -(10**30), 10**5000, 1j, b"1", {1}, object(), range(2), str, print],
}
UNKNOWN_NAMES = [
    "",
    " ",
    "Sigmoid",
    "sigmoid ",
    "sigmod",
    "grpo2",
    "nonexistent",
    "ünïcödé",
    "\u202e",
    "\ud800",
    "None",
]
UNKNOWN_NAMES += ["x" * 5000, "no_such_module_here:Loss", "json:no_such_loss", "json:JSONDecodeError", "math:pi"]
UNKNOWN_NAMES += [":", "a:", ":a", "a:b:c", "../x:y", "1:2", "trl_custom_losses:Loss"]

#: Values outside of the range of a hyperparameter, whatever the loss.
_OUT_OF_RANGE = {
    **dict.fromkeys(("beta", "final_beta", "target_kl", "discopop_tau", "max_grad_norm", "sapo_temperature_pos"), 0.0),
    **dict.fromkeys(("vespo_lambda_pos", "vespo_lambda_neg", "sapo_temperature_neg"), 0.0),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "delta", "epsilon", "epsilon_high", "margin_scale"), -0.1),
    **dict.fromkeys(("b1", "margin_decay", "label_smoothing"), 1.0),
    **dict.fromkeys(("threshold", "similarity_threshold"), 1.1),
    **dict.fromkeys(("horizon", "decay_steps", "max_completion_length", "max_group_size", "max_ngram"), 0),
    "warmup_steps": -1,
}
_SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"value": 0.3},
    "linear": {"start": 0.3, "end": 0.2, "total_steps": 10},
    "cosine": {"start": 0.3, "end": 0.2, "total_steps": 10},
    "warmup_cosine": {"start": 0.2, "peak": 0.3, "end": 0.2, "warmup_steps": 5, "total_steps": 10},
    "exponential": {"start": 0.3, "decay": 0.99},
    "piecewise": {"boundaries": [2, 5], "values": [0.3, 0.2, 0.1]},
}
_BAD_SCHEDULE_VALUES: dict[str, list[Any]] = {
    "total_steps": [0, -5, 1.5, "10", True, 2**70, [], {}],
    "warmup_steps": [-1, 11, 0.5, "5", None, False],
    "decay": [0.0, -0.5, 1.5, math.nan, "x", None],
    "boundaries": [[], [5, 2], [2, 2], [0, 1], [-1, 3], [1.5, 2], ["2", 5], 3, None, {}, [2], [True, 5], [2, 10**400]],
    "values": [[], [1.0], [0.3, "x", 0.1], [0.3, math.nan, 0.1], [0.3, None, 0.1], 0.5, None, {}, [0.3, 10**400, 0.1]],
}
NOT_NUMBERS = ["x", "0.1", None, True, math.nan, -math.inf, [], {}, [0.1], 10**400, 1j, {"schedule": "constant"}]


def is_loss(value: Any) -> bool:
    """Whether a part of a configuration describes a loss."""
    return isinstance(value, dict) and isinstance(value.get("type"), str) and "schedule" not in value


def losses_in(config: Any, path: Path = ()) -> Iterator[Path]:
    """Where in a valid configuration losses stand that are written as dicts."""
    if is_loss(config) and (not path or path[-1] not in ("balancing", "rule")):
        yield path
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield from losses_in(value, (*path, key))


def at(config: Any, path: Path) -> Any:
    """The part of a configuration at a path."""
    for key in path:
        config = config[key]
    return config


# Makers. Each gets a loss's own dict, which it may change, and returns how and the fields, or None if it has no use.


def _wrong_type(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]] | None:
    if draw(st.booleans()):
        del loss["type"]
        return "no type", written("type")
    kinds = [kind for kind in _VALUES if kind != "str"]
    loss["type"] = draw(st.sampled_from([value for kind in kinds for value in _VALUES[kind]]))
    return "type of another type", written("type")


def _unknown_name(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]]:
    loss["type"] = draw(st.sampled_from(UNKNOWN_NAMES))
    name = loss["type"]
    ways = [f"no loss named {name!r}", f"'package.module:Loss', found {name!r}", f" for {name!r}"]
    return "unknown loss", (*ways, f"loss '{name}' must be a class", "is a base class, not a loss")


def _other_family(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]]:
    other = {"preference": "policy", "policy": "preference"}[family]
    names = [name for name in LossFunctionRegistry.names(other) if name not in LossFunctionRegistry.names(family)]
    name = draw(st.sampled_from(names))
    kept = {key: loss[key] for key in ("name", "weight") if key in loss}
    loss.clear()
    loss |= {"type": name, **copy.deepcopy(dict(LossFunctionRegistry.get(name).example)), **kept}
    return "other family", (f"'{name}' is a {other} loss", f"found {name!r}")


def _unknown_key(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]]:
    declared = list(_declared(loss))
    typos = [name + "s" for name in declared] + [name[:-1] for name in declared] + [name.upper() for name in declared]
    odd = ["", " ", "ünïcödé", "\u202e", "\ud800", "self", "__class__", "type ", "Type", "batch", "names", "x" * 300]
    aliases = LossFunctionRegistry.get(loss["type"]).aliases
    key = draw(st.sampled_from([key for key in typos + odd if key not in declared and key not in aliases]))
    loss[key] = draw(st.sampled_from([0.1, None, "x", {"schedule": "constant", "value": 1.0}, [], {}]))
    return "unknown hyperparameter", written(key)


def _key_that_is_no_text(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]]:
    key = draw(st.sampled_from([1, None, True, 0.5, (1, 2), b"beta", math.nan, frozenset()]))
    loss[key] = 0.5
    return "key that is no text", (repr(key),)


def _value_of_another_type(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]] | None:
    usable = [hp for hp in _declared(loss).values() if hp.annotation is not Any]
    if not usable:
        return None
    hyperparameter = draw(st.sampled_from(usable))
    loss[hyperparameter.name] = draw(st.sampled_from(_not_of(hyperparameter)))
    return "value of another type", written(hyperparameter.name)


def _out_of_range(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]] | None:
    names = [name for name in _declared(loss) if name in _OUT_OF_RANGE]
    if not names or loss["type"] == "dynamic_multi_objective":
        return None
    name = draw(st.sampled_from(names))
    loss[name] = _OUT_OF_RANGE[name]
    if draw(st.booleans()):  # in the end, from a value that is allowed if one is known
        default = _declared(loss)[name].default
        start = default if isinstance(default, (int, float)) else _OUT_OF_RANGE[name]
        loss[name] = {"schedule": "linear", "start": start, "end": _OUT_OF_RANGE[name], "total_steps": 4}
    return "out of range", written(name)


def _bad_schedule(draw: Draw, loss: dict[str, Any], family: str) -> tuple[str, tuple[str, ...]] | None:
    names = [name for name, hp in _declared(loss).items() if _kinds(hp.annotation) & {"int", "float"}]
    if not names:
        return None
    name = draw(st.sampled_from(names))
    loss[name], fields = broken_schedule(draw)
    return "schedule", (*fields, *written(name))


_MAKERS = [_wrong_type, _unknown_name, _other_family, _unknown_key, _key_that_is_no_text, _value_of_another_type]
_MAKERS += [_value_of_another_type, _out_of_range, _bad_schedule]


def broken_schedule(draw: Draw) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A schedule with a mistake, and the field that it is in."""
    name = draw(st.sampled_from(sorted(_SCHEDULES)))
    schedule = {"schedule": name, **copy.deepcopy(_SCHEDULES[name])}
    how = draw(st.sampled_from(["name", "missing", "extra", "value", "value"]))
    if how == "name":
        schedule["schedule"] = draw(st.sampled_from(["linaer", "", "LINEAR", None, 3, [], {}, True, math.nan, ("a",)]))
        return schedule, written("schedule")
    key = draw(st.sampled_from([key for key in schedule if key != "schedule"]))
    if how == "missing" and key != "total_steps":
        del schedule[key]
    elif how == "extra":
        key = draw(st.sampled_from(["ends", "steps", "", "name", "_run_steps", 3, None, "constant", "ünï", "extremes"]))
        schedule[key] = 1
    elif how == "missing":
        schedule["total_steps"] = 0
    else:
        schedule[key] = draw(st.sampled_from(_BAD_SCHEDULE_VALUES.get(key, NOT_NUMBERS)))
    return schedule, written(key)


@st.composite
def broken_losses(draw: Draw, family: str) -> Broken:
    """A valid configuration of which one loss is broken."""
    config = copy.deepcopy(configs(family)[draw(st.sampled_from(sorted(configs(family))))])
    path = draw(st.sampled_from(list(losses_in(config))))
    if path and config["type"] == "rollout_pairs":
        family = "preference"
    made = draw(st.sampled_from(_MAKERS))(draw, at(config, path), family)
    if made is None:  # a loss without such hyperparameters
        made = _unknown_key(draw, at(config, path), family)
    how, fields = made
    return Broken(config, f"{how} at {path}", fields)


# Shape


def nested(depth: int, kind: str) -> Any:
    """Valid, but for its depth."""
    config: Any = "sigmoid"
    for _ in range(depth):
        config = {"type": "clipped_loss", "base_loss": config}
        if kind == "composed":
            config = {"type": "composed", "components": [config]}
    return config


def self_containing() -> list[Broken]:
    """Configurations that hold themselves, or values that do."""
    clipped: dict[str, Any] = {"type": "clipped_loss"}
    clipped["base_loss"] = clipped
    components: list[Any] = [{"type": "sigmoid"}]
    components.append({"type": "composed", "components": components})
    endless: list[Any] = []
    endless.append(endless)
    ring: dict[str, Any] = {}
    ring["x"] = [ring]
    return [
        Broken(clipped, "itself as base_loss", written("base_loss")),
        Broken({"type": "composed", "components": components}, "itself among components", written("components")),
        Broken({"type": "sigmoid", "beta": endless}, "endless list", written("beta")),
        Broken({"type": "sigmoid", "beta": ring}, "endless dict", written("beta")),
        Broken(
            {"type": "sigmoid", "beta": {"schedule": "constant", "value": endless}}, "in a schedule", written("value")
        ),
        Broken(ring, "nothing but itself", ("'x'",)),
    ]


# What a type takes


def _declared(loss: dict[str, Any]) -> dict[str, Hyperparameter]:
    return LossFunctionRegistry.get(loss["type"]).declared_hyperparameters()


def _kinds(annotation: Any) -> set[str]:
    """What kinds of values a type takes."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(argument) for argument in arguments))
    if origin is Literal:
        return {"choice"}
    simple = {float: {"int", "float"}, int: {"int"}, str: {"str"}, bool: {"bool"}, list: {"list"}, dict: {"dict"}}
    simple |= {type(None): {"none"}}
    if annotation in simple:
        return simple[annotation]
    name = getattr(origin or annotation, "__name__", "")
    return {"Mapping": {"dict"}, "Real": {"int", "float"}}.get(name, set())


def _not_of(hyperparameter: Hyperparameter) -> list[Any]:
    """Values that a hyperparameter's type does not take."""
    kinds = _kinds(hyperparameter.annotation)
    describes_a_loss = "str" in kinds and "dict" in kinds and hyperparameter.name != "signal"  # that names a metric
    found = [value for kind, values in _VALUES.items() if kind not in kinds for value in values]
    if "int" in kinds and "float" not in kinds:
        found.append(1.5)
    if describes_a_loss:
        found += [*_VALUES["dict"], *_VALUES["str"]]
    return [value for value in found if not (isinstance(value, tuple) and "list" in kinds)]
