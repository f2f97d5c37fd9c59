"""Pictures of the objective: the loss, its components, their weights, and what moves."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..registry import LossFunctionRegistry
from .components import Component, Group, groups_of
from .history import History
from .lines import draw_evaluations, draw_series, evaluation_entries, running_mean, spread_out, widened, window_of
from .page import unit_of
from .picture import MOST_CURVES, Panel, Picture, Pictures, keys, panels, picture_of, smoothed
from .style import finish_axes, label_text, legend_beside, legend_height, new_figure, style

_MOST_PANELS = 8
#: Hyperparameters of losses that are also what the Trainer calls something of its own.
_NOT_MOVING = {"learning_rate", "loss", "entropy", "kl", "reward"}


def loss_picture(history: History) -> Pictures:
    """The Trainer's loss over the run."""
    caption = "What the optimizer minimises, with everything that the trainer adds to the loss function."
    if history.evaluated("loss"):
        caption += " Evaluations are hollow points."
    if "reward" in history.train:
        caption += " That of a policy gradient stays about 0 however well it goes; the rewards tell."
    return picture_of(
        "loss",
        "The loss that is minimised",
        caption,
        [Panel("Loss over the run", "loss", {"loss": "loss"})],
        history,
    )


def component_pictures(history: History) -> Pictures:
    """Each composition's weighted components, stacked; below, each component before its weight."""
    pictures = []
    for index, group in enumerate(groups_of(history.train)):
        drawn, rest = largest(group)
        evaluations = [f"{part.key}_loss" for part in drawn]
        height = max(3.0, legend_height(len(drawn) + 2 + len(history.evaluations)))
        figure, (stacked, plain) = new_figure(2, 1, size=(8.4, 0.6 + 2 * height))
        draw_stack(stacked, group)
        of = f" of {label_text(group.name)}" if group.name else ""
        finish_axes(stacked, title=f"Each component{of} times its weight, stacked", y="loss x weight")
        for number, component in enumerate(drawn):
            draw_series(plain, component.loss, style(number), _component_label(component))
            draw_evaluations(plain, history, f"{component.key}_loss", style(number))
        finish_axes(plain, title="Each component before its weight", y="loss")
        entries = list(zip(*plain.get_legend_handles_labels(), strict=True))
        legend_beside(plain, entries + evaluation_entries(history, evaluations))
        caption = (
            "Above, how much each component adds to the total (black line); components below 0 take away from it and "
            "are stacked downwards. Below, the components as they are, before their weights. Losses of "
            "log-probabilities are in nats."
        )
        caption += "".join(f" {label_text(part.name)} was never finite." for part in group.never_finite)
        if rest:
            caption += f" The {len(rest)} components that add least are one area above, and left out below."
        missing = group.missing_share()
        if missing > 0.01:
            caption += (
                f" The components' sum differs from the logged total by up to {missing:.0%} of it: logged values are "
                "means over several steps or micro-batches, or the composition adds a term of its own."
            )
        shown = {f"{part.key}{end}" for part in group.components for end in ("_loss", "_weight")}
        shown |= {f"{group.name}/total_loss" if group.name else "total_loss"}
        name = "components" if index == 0 else f"components-{index + 1}"
        title = f"Which component drives {label_text(group.name) if group.name else 'the loss'}"
        pictures.append((Picture(name, title, caption + smoothed(history, shown), figure), shown))
    return pictures


def largest(group: Group) -> tuple[list[Component], list[Component]]:
    """The components that add most to the total, and the rest; both in the group's order.

    All are drawn if there are styles for all. Those that were never finite come last.
    """
    parts = list(group.components)
    if len(parts) <= MOST_CURVES:
        return parts, []
    size = {part.key: np.nanmean(np.abs(part.weighted(group.steps))) if part.finite else -1.0 for part in parts}
    kept = sorted(parts, key=lambda part: -np.nan_to_num(size[part.key]))[: MOST_CURVES - 1]
    return [part for part in parts if part in kept], [part for part in parts if part not in kept]


def _component_label(component: Component) -> str:
    return label_text(component.name) + ("" if component.finite else " (never finite)")


def draw_stack(axes: Axes, group: Group) -> None:
    """Stack weighted components over steps: what is above 0 upwards, what is below 0 downwards.

    Where a component was not logged, or is not finite, the stack has a gap; one that never was is left out of it. Of
    many, those that add least are one area.
    """
    steps = group.steps
    drawn, rest = largest(group)
    rows = [(_component_label(part), part.weighted(steps) if part.finite else None) for part in drawn]
    if rest:
        others = [part.weighted(steps) for part in rest if part.finite]
        rows.append((f"{len(rest)} others", np.sum(others, axis=0) if others else None))
    present = [values for _, values in rows if values is not None]
    known = np.isfinite(present).all(0) if present else np.zeros(steps.size, dtype=bool)
    window = window_of(steps.size)
    shown = spread_out(steps.size)
    smooth = [running_mean(np.where(known, values, np.nan), window)[shown] for values in present]
    line_steps = steps[shown]
    steps_of_areas, *smooth = with_crossings(*widened(line_steps, *smooth))
    above, below = np.zeros(steps_of_areas.size), np.zeros(steps_of_areas.size)
    areas = iter(smooth)
    entries: list[tuple[object, str]] = []
    for index, (label, found) in enumerate(rows):
        look = style(index)
        paint = {"facecolor": look.pale, "edgecolor": look.color, "hatch": look.hatch, "linewidth": 0.8}
        entries.append((Patch(**paint), label))
        if found is None:
            continue
        values = next(areas)
        for part, base in ((np.maximum(values, 0), above), (np.minimum(values, 0), below)):
            if np.nanmax(np.abs(part), initial=0.0) > 0:
                axes.fill_between(steps_of_areas, base, base + part, **paint)
        above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
    sums = np.sum(present, axis=0) if present else np.full(steps.size, np.nan)
    total = running_mean(sums if group.total is None else group.total.at(steps), window)[shown]
    few = "o" if steps.size <= 30 else None
    (line,) = axes.plot(line_steps, total, color="#000000", linewidth=1.8, marker=few, markersize=4)
    axes.axhline(0.0, color="#000000", linewidth=0.8)
    entries.append((line, "total" if group.total is not None else "their sum"))
    legend_beside(axes, entries)


def with_crossings(steps: np.ndarray, *curves: np.ndarray) -> list[np.ndarray]:
    """Steps and curves, with a point added to all wherever one of them crosses 0 between two steps.

    Without it, what is above 0 would fade out, and what is below 0 fade in, over the whole way between the two.
    """
    places, shares = [], []
    for curve in curves:
        at = np.flatnonzero(curve[:-1] * curve[1:] < 0)
        places += at.tolist()
        shares += (curve[at] / (curve[at] - curve[at + 1])).tolist()
    order = np.lexsort((shares, places))
    place, share = np.array(places, dtype=int)[order], np.array(shares)[order]
    return [
        np.insert(values.astype(float), place + 1, values[place] + share * (values[place + 1] - values[place]))
        for values in (steps, *curves)
    ]


def weight_picture(history: History) -> Pictures:
    """Weights of components."""
    names = {key: key.removesuffix("_weight") for key in keys(history, suffix="_weight")}
    names = {key: label for key, label in names.items() if f"{label}_loss" in history.train}
    return picture_of(
        "weights",
        "How the components are weighted",
        "The factor of each component in the total, with schedules, rules and gradient balancing in it. No unit.",
        panels("Weight of each component", "weight", names),
        history,
    )


def moving_picture(history: History) -> Pictures:
    """Hyperparameters that move: `adaptive_beta` with what it follows, and all that are scheduled."""
    adaptive = ("adaptive_beta", "adaptive_margin", "adaptive_kl")
    titles = {}
    declared = {
        hyperparameter
        for loss in LossFunctionRegistry.names()
        for hyperparameter in LossFunctionRegistry.get(loss).declared_hyperparameters()
    }
    for key in keys(history):
        own = key.rsplit("/", 1)[-1]
        if own in adaptive:
            titles[key] = key
        elif own in declared - _NOT_MOVING and (own == key or f"{key.removesuffix(f'/{own}')}_loss" in history.train):
            titles[key] = f"{key} (scheduled)"
    drawn = [
        Panel(label_text(title), unit_of(key) or "value", {key: label_text(key)}, evaluations=False)
        for key, title in titles.items()
    ]
    drawn = [panel for panel in drawn if panel.logged(history)][:_MOST_PANELS]
    return picture_of(
        "hyperparameters",
        "Hyperparameters that move",
        "Values that a schedule sets, or that a loss adapts to the training. An adaptive beta follows the margin, or "
        "the KL to the reference, that is drawn with it.",
        drawn,
        history,
    )
