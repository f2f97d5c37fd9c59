"""Pictures of losses, from the registry alone."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..base import Loss
from ..errors import LossConfigError
from ..schedules import Schedule
from ..types import Family
from .curves import (
    PolicyCurve,
    PreferenceCurve,
    drawable,
    drawable_losses,
    example_columns,
    policy_curve,
    preference_curve,
)
from .style import drawing, finish_axes, label_text, new_figure, save, style

_MARGIN = "margin: chosen minus rejected log-ratio (nats)"
_RATIO = "importance ratio: policy / policy at generation"
_PANEL_COLUMNS = 4
_FEW, _MANY = 201, 601


def plot_loss(config_or_name: str | Mapping[str, Any], path: str | Path) -> Path:
    """Draw one loss and its gradient: a preference loss against the margin, a policy surrogate against the ratio.

    A pair has one token on each side, whose log-ratios to the reference are half the margin and minus half the margin.
    A policy surrogate is drawn for one token with an advantage of 1 and of -1, before any average over tokens; where
    its value depends on the log-probability itself, that at generation is -2 nats. Gradients come from automatic
    differentiation of the loss itself. Scheduled hyperparameters have the value of the first step.

    Args:
        config_or_name: A registered name, an import path, or a dict with `type` and hyperparameters; those that have no
            default and are not given are the loss's own example.
        path: Of the PNG; its folder is made.

    Returns:
        The path.

    Raises:
        LossConfigError: The loss cannot be built, or no such picture can be drawn of it.
    """
    loss = drawable(config_or_name)
    with drawing():
        figure, (value, gradient) = new_figure(1, 2, size=(11.0, 3.8))
        curve = _draw(loss, value, gradient)
        value.set_title(f"{label_text(loss.name)}: the loss of one {_unit(loss)}")
        gradient.set_title("Its gradient: below 0, a step raises the log-probability")
        figure.supxlabel(_subtitle(loss) + _assumed(curve), fontsize=9, color="#444444")
        return save(figure, Path(path))


def plot_losses(names: Iterable[str | Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw several losses, one PNG each, named after the loss.

    Args:
        names: As for `plot_loss`.
        folder: Of the PNGs; made if it is missing.

    Raises:
        LossConfigError: One of them cannot be drawn; then none is.
    """
    configs = list(names)
    for config in configs:
        drawable(config)
    paths: list[Path] = []
    for config in configs:
        name = config if isinstance(config, str) else config["type"]
        stem = re.sub(r"[^\w-]+", "_", name)
        repeated = sum(path.stem == stem or path.stem.startswith(f"{stem}-") for path in paths)
        paths.append(plot_loss(config, Path(folder) / f"{stem}{f'-{repeated + 1}' if repeated else ''}.png"))
    return paths


def plot_family(family: Family, path: str | Path) -> Path:
    """Draw every loss of a family that can be drawn, side by side: above the loss, below its gradient.

    Compositions are left out, since their picture is that of whatever they are made of.

    Args:
        family: "preference" or "policy".
        path: Of the PNG.

    Raises:
        LossConfigError: There is no such family.
    """
    losses = [loss for name in drawable_losses(family) if not (loss := drawable(name)).composite]
    rows = math.ceil(len(losses) / _PANEL_COLUMNS)
    with drawing():
        figure = Figure(figsize=(3.3 * _PANEL_COLUMNS, 3.9 * rows + 0.7), layout="constrained")
        grid = figure.add_gridspec(rows, _PANEL_COLUMNS)
        value = None
        for cell, loss in zip(grid, losses, strict=False):
            parts = cell.subgridspec(2, 1, height_ratios=(3, 2), hspace=0.05)
            value, gradient = figure.add_subplot(parts[0]), figure.add_subplot(parts[1])
            _draw(loss, value, gradient, small=True)
            value.set_title(label_text(loss.name))
        if value is not None:
            entries = [*zip(*value.get_legend_handles_labels(), strict=True)]
            entries += [*zip(*gradient.get_legend_handles_labels(), strict=True)]
            entries = list({label: handle for handle, label in entries}.items())
            figure.legend([h for _, h in entries], [name for name, _ in entries], loc="outside lower center", ncols=4)
        against = "the margin" if family == "preference" else "the importance ratio"
        figure.suptitle(f"The {family} losses and their gradients against {against}", fontsize=14)
        return save(figure, Path(path))


def _unit(loss: Loss) -> str:
    return "pair" if loss.family == "preference" else "token"


def _settings(loss: Loss, name: str = "") -> Iterator[str]:
    """Hyperparameters of a loss and of all that it is made of; of a composition, its weights."""
    label = f"{name}: " if name else ""
    if loss.composite:
        yield f"{label}{loss.extra_repr()}"
        for component, child in loss.components():
            yield from _settings(child, component)
        return
    values = loss.hyperparameters()
    if values.get("epsilon_high", 0) is None:  # the bound in force
        values["epsilon_high"] = values.get("epsilon")
    shown = {key: value for key, value in values.items() if isinstance(value, (int, float, str, Schedule))}
    if shown:
        yield label + ", ".join(f"{key} = {value}" for key, value in shown.items())


def _subtitle(loss: Loss) -> str:
    text = "; ".join(part for part in _settings(loss) if part)
    text = textwrap.fill(text, 150, max_lines=2, placeholder=" …")
    if any(part.schedules for part in loss.tree()):
        text += "\nscheduled hyperparameters have the value of the first step"
    columns = example_columns(loss)
    if columns:
        text += "\nfor a row of " + ", ".join(f"{name} = {value:g}" for name, value in columns.items())
    if loss.batch_coupled:
        text += "\nof a pair alone: in a batch, the loss compares pairs with each other"
    if any(part.stop_gradient for part in loss.tree()):
        text += "\nparts of it are detached: the gradient is not the slope of the loss"
    return text


def _assumed(curve: PreferenceCurve | PolicyCurve) -> str:
    if not isinstance(curve, PreferenceCurve) or curve.reference is None:
        return ""
    return (
        f"\nthe numbers do not follow from the margin alone: both completions have {curve.reference:g} nats under the "
        "reference here"
    )


def _draw(loss: Loss, value: Axes, gradient: Axes, *, small: bool = False) -> PreferenceCurve | PolicyCurve:
    points = _FEW if small else _MANY
    if loss.family == "preference":
        pair = preference_curve(loss, points=points)
        _draw_preference(pair, value, gradient, small=small)
        return pair
    if loss.family == "policy":
        token = policy_curve(loss, points=points)
        _draw_policy(token, value, gradient, small=small)
        return token
    raise LossConfigError(f"the loss '{loss.name}' belongs to no family")


def _draw_preference(curve: PreferenceCurve, value: Axes, gradient: Axes, *, small: bool) -> None:
    value.plot(curve.margins, curve.values, color=style(0).color, linewidth=2, label="loss of a pair")
    for index, (slopes, name) in enumerate(((curve.chosen, "chosen"), (curve.rejected, "rejected")), start=1):
        look = style(index)
        label = f"gradient by the {name} log-ratio" if small else f"by the {name} log-ratio"
        gradient.plot(curve.margins, slopes, color=look.color, linestyle=look.dash, linewidth=2, label=label)
    _finish(value, gradient, _MARGIN, small=small, zero=0.0)
    if curve.beta is not None and not small:
        beta = curve.beta
        for axes in (value, gradient):
            scaled = axes.secondary_xaxis("top", functions=(lambda m: m * beta, lambda z: z / beta))
            scaled.set_xlabel(f"beta x margin (beta = {beta:g})", fontsize=9)


def _draw_policy(curve: PolicyCurve, value: Axes, gradient: Axes, *, small: bool) -> None:
    for index, advantage in enumerate(curve.values):
        look = style(index)
        paint = {"color": look.color, "linestyle": look.dash, "linewidth": 2, "label": f"advantage {advantage:+g}"}
        value.plot(curve.ratios, curve.values[advantage], **paint)
        gradient.plot(curve.ratios, curve.gradients[advantage], **paint)
    _finish(value, gradient, _RATIO, small=small, zero=1.0)


def _finish(value: Axes, gradient: Axes, x: str, *, small: bool, zero: float) -> None:
    """Labels; a thin line where the policy is the reference, or the one that generated, and one at gradient 0."""
    short = x.split(" (")[0].split(":")[0] + (" (nats)" if "nats" in x else "")
    finish_axes(value, x="" if small else x, y="loss")
    finish_axes(gradient, x=short if small else x, y="gradient" if small else "gradient (loss per nat)")
    for axes in (value, gradient):
        axes.axvline(zero, color="#888888", linewidth=0.8)
        low, high = axes.get_ylim()
        if high - low < 1e-9:  # a flat line has no scale of its own
            axes.set_ylim(low - 1, high + 1)
    gradient.axhline(0.0, color="#888888", linewidth=0.8)
    if small:
        value.tick_params(labelbottom=False)
    else:
        gradient.legend(loc="best")
        if len(value.get_lines()) > 2:
            value.legend(loc="best")


__all__ = ["plot_family", "plot_loss", "plot_losses"]
