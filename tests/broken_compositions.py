"""Compositions that are broken in a known way: components, names, weights, balancing, rules, signals.

Every maker gets a family, two losses of it and a valid `dynamic_multi_objective`, and returns a broken configuration
and the texts of which its error must hold one.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from hypothesis import strategies as st

from tests.broken_configs import NOT_NUMBERS, Broken, Draw, broken_schedule, written
from trl_custom_losses.balancing.rules import RULES

Config = dict[str, Any]
Made = tuple[Config, tuple[str, ...]]

#: Values outside of the range of rules' options, by rule.
_RULE_OPTIONS: dict[str, dict[str, list[Any]]] = {
    "trend": {"adaptation_rate": [1.0, -0.1], "floor": [0.0]},
    "dwa": {"temperature": [0.0], "window": [0, 1.5], "loss_floor": [0.0]},
    "softadapt": {"variant": ["none", 1], "window": [0], "accuracy_order": [0, 99], "beta": [math.inf]},
    "relobralo": {"alpha": [1.1], "tau": [0.0], "rho": [-0.1], "seed": [0.5, "x"], "loss_floor": [-1.0]},
    "constraint": {"eta": [0.0], "k_i": [-1.0], "k_p": [-1.0], "nu": [1.0], "targets": [3, [], {"nobody": 1.0}]},
    "uncertainty": {"learning_rate": [0.0], "loss_floor": [0.0]},
}
_RULE_OPTIONS["constraint"]["targets"] += [{"other": "x"}, {"other": math.nan}, {"other": None}, {"other": 10**400}]

_LOSS = {"preference": "sigmoid", "policy": "grpo"}
_OTHER = {"preference": "sft", "policy": "dapo"}


_COMPONENT = (
    *written("components"),
    "component 1",
    "component 2",
    "component '",
    "a component's 'name'",
    "share the name",
)


def _in_composed(*components: Any, **options: Any) -> dict[str, Any]:
    return {"type": "composed", "components": list(components), **options}


@st.composite
def broken_compositions(draw: Draw, family: str) -> Broken:
    """Components, weights, balancing, rules and signals with mistakes."""
    first, second = {"type": _LOSS[family]}, {"type": _OTHER[family]}
    objectives = {"main": _LOSS[family], "other": dict(second)}
    dynamic = {"type": "dynamic_multi_objective", "objectives": objectives}
    how = draw(st.sampled_from(sorted(_COMPOSITIONS)))
    config, fields = _COMPOSITIONS[how](draw, family, first, second, dynamic)
    return Broken(config, how, fields)


def _components(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    bad = [None, 3, "x", {}, [], [None], [3], [{}], [first, None], ["sigmoid"], [[first]], [first, [second, 1.0]], True]
    bad += [[{"name": "a"}], [first, {"type": 3}], [("a", 1.0, {"type": "sft"})], {"a": first}, math.nan]
    return _in_composed() | {"components": draw(st.sampled_from(bad))}, _COMPONENT


def _names(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    odd = ["", "a.b", "total", "policy", "aux", "train", "eval", 3, None, True, [], {}, ("a",), b"a", math.nan]
    name = draw(st.sampled_from([*odd, _OTHER[family]]))
    return _in_composed(first | {"name": name}, second), (*written("name"), "component name", "share the name")


def _weights(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    if draw(st.booleans()):
        schedule, fields = broken_schedule(draw)
        return _in_composed(first, second | {"weight": schedule}), (*fields, *written("weight"))
    bad = [value for value in NOT_NUMBERS if value != {"schedule": "constant"}]
    return _in_composed(first, second | {"weight": draw(st.sampled_from(bad))}), written("weight")


def _balancing(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    bad: list[Any] = ["", "upgard", 3, True, [], ["upgrad"], {}, {"type": None}, {"type": "x"}, {"decay": 0.5}, 0.5]
    bad += [{"type": "mgda", "reg_eps": 0.1}, {"type": "cagrad", "c": -1}, {"type": "cagrad", "c": math.inf}]
    bad += [{"type": "upgrad", "gramian": value} for value in ("now", 3, None, True, [], {})]
    bad += [{"type": "upgrad", "decay": value} for value in (1.0, -0.1, "x", None, True, math.nan, [], {}, 10**400)]
    bad += [{"type": "upgrad", "reg_eps": 0.0}, {"type": "upgrad", "gramian": "current", "decay": 0.5}, {3: 4}]
    bad += [{"type": "upgrad", key: 1} for key in ("decays", "", 3, None, "names", "aggregator")]
    both = [_in_composed(first, second), copy.deepcopy(dynamic)]
    config = draw(st.sampled_from(both))
    if draw(st.integers(0, 9)) == 0:
        return _in_composed(first, balancing="upgrad"), written("balancing")
    config["balancing"] = draw(st.sampled_from(bad))
    return config, (*written("balancing"), "balancing '")


def _objectives(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    bad: list[Any] = [None, 3, "x", [], {}, [first], True, {"a": None}, {"a": 3}, {"a": {}}, {"a": {"type": None}}]
    bad += [{"": first}, {"a.b": first}, {"total": first}, {3: first}, {None: first}, {"a": "nonexistent"}, {"a": []}]
    return dynamic | {"objectives": draw(st.sampled_from(bad))}, (
        *written("objectives"),
        "objective '",
        "component name",
        *_COMPONENT,
    )


def _initial_weights(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    bad: list[Any] = [3, "x", [1.0, 1.0], True, {"nobody": 1.0}, {3: 1.0}, {"main": -1.0}, {"main": 1e7}, {"": 1.0}]
    bad += [{"main": value} for value in NOT_NUMBERS] + [{"main": {"schedule": "constant", "value": 1.0}}]
    return dynamic | {"initial_weights": draw(st.sampled_from(bad))}, (
        *written("initial_weights"),
        "'weight",
        "weight for",
    )


def _rule(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    if draw(st.booleans()):
        bad = ["", "tredn", 3, True, [], {}, {"type": None}, {"type": "x"}, {"type": []}, {"floor": 0.1}, {3: 4}, 0.5]
        return dynamic | {"rule": draw(st.sampled_from(bad))}, written("rule")
    rule = draw(st.sampled_from(sorted(RULES)))
    needed = {"targets": {"other": 1.0}} if rule == "constraint" else {}
    how = draw(st.sampled_from(["value", "value", "type", "unknown", "foreign", "twice"]))
    options = _RULE_OPTIONS[rule]
    if how == "unknown":
        key, value = draw(st.sampled_from(["tau2", "names", "initial_weights2", "", "ünï"])), 1.0
    elif how == "foreign":
        foreign = {name for other in _RULE_OPTIONS.values() for name in other} - set(options)
        key, value = draw(st.sampled_from(sorted(foreign))), 0.5
    elif how == "twice":
        key, value = draw(st.sampled_from(sorted(options))), 0.5
        return dynamic | needed | {"rule": {"type": rule, key: 0.5}, key: 0.5}, written(key)
    else:
        key = draw(st.sampled_from(sorted(options)))
        bad = options[key] if how == "value" else [True, [], {1: 2}, math.nan, 10**400, 1j, b"x"]
        value = draw(st.sampled_from(bad))
    inside = draw(st.booleans())
    if inside:
        return dynamic | {"rule": {"type": rule, **needed, key: value}}, written(key)
    return dynamic | needed | {"rule": rule, key: value}, written(key)


def _signal(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    bad: list[Any] = [3, True, [], 0.5, {"nobody": "kl"}, {"main": 3}, {"main": None}, {3: "kl"}, {"main": ["kl"]}]
    wrong = {"preference": "reward", "policy": "margin"}[family]
    return dynamic | {"signal": draw(st.sampled_from([*bad, wrong, {"other": wrong}]))}, (
        *written("signal"),
        f"the signal '{wrong}'",
    )


def _auxiliary(draw: Draw, family: str, first: Config, second: Config, dynamic: Config) -> Made:
    config: dict[str, Any] = {"type": "multi_objective_dpo", "auxiliary_losses": {"perplexity": {}}}
    if family == "policy":  # the same place for compositions of the other family: a main loss, and weights
        bad = [None, 3, "quality", {}, {"type": None}, "nonexistent", [], True, {"type": "diversity"}, "sigmoid"]
        if draw(st.booleans()):
            return {"type": "multi_objective_grpo", "base": draw(st.sampled_from(bad))}, written("base")
        name = draw(st.sampled_from(["quality_weight", "diversity_weight"]))
        return {"type": "multi_objective_grpo", name: draw(st.sampled_from(NOT_NUMBERS))}, written(name, name[:-7])
    if draw(st.booleans()):
        bad = [None, 3, "x", [3], [None], ["perplexity", "perplexity"], {"nonexistent": {}}, ["nonexistent"], True]
        bad += [{"perplexity": 3}, {"perplexity": []}, {"perplexity": {"x": 1}}, {3: {}}, {"a.b": {"type": "sft"}}]
        bad += [{"perplexity": {"completions": "none"}}, {"": {}}, {"grpo": {}}, {"x": {"type": "grpo"}}]
        return config | {"auxiliary_losses": draw(st.sampled_from(bad))}, (*written("auxiliary_losses"), *_COMPONENT)
    bad = [3, "x", [1.0], {"nobody": 1.0}, {3: 1.0}, *({"perplexity": value} for value in NOT_NUMBERS)]
    return config | {"auxiliary_weights": draw(st.sampled_from(bad))}, (
        *written("auxiliary_weights"),
        "'weight'",
        "weight for",
    )


_PARTS = (_components, _names, _weights, _balancing, _objectives, _initial_weights, _rule, _signal, _auxiliary)
_COMPOSITIONS = {part.__name__.strip("_"): part for part in _PARTS}
