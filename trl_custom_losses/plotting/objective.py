"""Pictures of the objective: the loss, its components, their weights, what moves, and their gradients."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ..registry import LossFunctionRegistry
from .components import Group, groups_of
from .history import History
from .lines import draw_evaluations, draw_series, running_mean, window_of
from .picture import Panel, Picture, Pictures, picture_of, smoothed
from .style import finish_axes, label_text, legend_beside, new_figure, style

#: More curves than this in one panel cannot be told apart.
_MOST_CURVES = 8
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
        figure, (stacked, plain) = new_figure(2, 1, size=(8.4, 6.6))
        draw_stack(stacked, group)
        of = f" of {label_text(group.name)}" if group.name else ""
        finish_axes(stacked, title=f"Each component{of} times its weight, stacked", y="loss x weight")
        for number, component in enumerate(group.components):
            draw_series(plain, component.loss, style(number), label_text(component.name))
            evaluated = history.evaluated(f"{component.key}_loss")
            draw_evaluations(plain, evaluated, style(number), label_text(component.name))
        finish_axes(plain, title="Each component before its weight", y="loss")
        legend_beside(plain)
        caption = (
            "Above, how much each component adds to the total (black line); components below 0 take away from it and "
            "are stacked downwards. Below, the components as they are, before their weights. Losses of "
            "log-probabilities are in nats."
        )
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


def draw_stack(axes: Axes, group: Group) -> None:
    """Stack weighted components over steps: what is above 0 upwards, what is below 0 downwards.

    Where a component was not logged, the stack has a gap.
    """
    steps, weighted = group.steps, group.weighted()
    known = np.isfinite(weighted).all(0)
    weighted = np.where(known, weighted, np.nan)
    window = window_of(steps.size)
    if window > 1:
        weighted = np.stack([running_mean(row, window) for row in weighted])
    above, below = np.zeros(steps.size), np.zeros(steps.size)
    entries: list[tuple[object, str]] = []
    for index, (component, values) in enumerate(zip(group.components, weighted, strict=True)):
        look = style(index)
        paint = {"facecolor": look.pale, "edgecolor": look.color, "hatch": look.hatch, "linewidth": 0.8}
        for part, base in ((np.maximum(values, 0), above), (np.minimum(values, 0), below)):
            if np.nanmax(np.abs(part), initial=0.0) > 0:
                axes.fill_between(steps, base, base + part, **paint)
        above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
        entries.append((Patch(**paint), label_text(component.name)))
    total = group.total.at(steps) if group.total is not None else weighted.sum(0)
    total = running_mean(total, window)
    few = "o" if steps.size <= 30 else None
    (line,) = axes.plot(steps, total, color="#000000", linewidth=1.8, marker=few, markersize=4)
    axes.axhline(0.0, color="#000000", linewidth=0.8)
    entries.append((line, "total" if group.total is not None else "their sum"))
    legend_beside(axes, entries)


def weight_picture(history: History) -> Pictures:
    """Weights of components."""
    names = {key: key.removesuffix("_weight") for key in _keys(history, suffix="_weight")}
    names = {key: label for key, label in names.items() if f"{label}_loss" in history.train}
    return picture_of(
        "weights",
        "How the components are weighted",
        "The factor of each component in the total, with schedules, rules and gradient balancing in it. No unit.",
        _panels("Weight of each component", "weight", names),
        history,
    )


def moving_picture(history: History) -> Pictures:
    """Hyperparameters that move: `adaptive_beta` with what it follows, and all that are scheduled."""
    adaptive = [("adaptive_beta", "beta", "per nat"), ("adaptive_margin", "margin that beta follows", "nats")]
    adaptive += [("adaptive_kl", "KL to the reference that beta follows", "nats")]
    known = {name: (label, unit) for name, label, unit in adaptive}
    declared = {
        hyperparameter
        for loss in LossFunctionRegistry.names()
        for hyperparameter in LossFunctionRegistry.get(loss).declared_hyperparameters()
    }
    for key in _keys(history):
        own = key.rsplit("/", 1)[-1]
        if own in known:
            known[key] = known[own]
        elif own in declared - _NOT_MOVING and (own == key or f"{key.removesuffix(f'/{own}')}_loss" in history.train):
            known[key] = (key, "value")
    panels = [Panel(label_text(label), unit, {key: label}, evaluations=False) for key, (label, unit) in known.items()]
    panels = [panel for panel in panels if panel.logged(history)][:_MOST_PANELS]
    return picture_of(
        "hyperparameters",
        "Hyperparameters that move",
        "Values that a schedule sets, or that a loss adapts to the training. Beta is per nat of log-ratio.",
        panels,
        history,
    )


def gradient_pictures(history: History) -> Pictures:
    """Cosines between components' gradients, their norms, clipped sequences, and norms by layer."""
    cosines = {key: _after(key, "grad_cosine/").replace("/", " and ") for key in _keys(history, part="grad_cosine/")}
    pictures = picture_of(
        "gradient-cosines",
        "Whether the components pull together",
        "Cosine between the gradients of two components with respect to the model's outputs over an optimizer step: 1 "
        "if they agree, 0 if they have nothing to do with each other, below 0 if they pull apart.",
        _panels("Cosine between two components' gradients", "cosine", cosines, (-1.0, 1.0)),
        history,
    )
    for picture, _ in pictures:
        for axes in picture.figure.axes:
            axes.axhline(0.0, color="#000000", linewidth=0.8)
    norms = {key: _after(key, "grad_norm/") for key in _keys(history, part="grad_norm/")}
    weighted = {key: _after(key, "grad_norm_weighted/") for key in _keys(history, part="grad_norm_weighted/")}
    if weighted:
        weighted |= {key: norms.pop(key) for key in list(norms) if key.endswith("grad_norm/total")}
    pictures += picture_of(
        "gradient-norms",
        "How strongly each component pulls",
        "Norm of each component's gradient with respect to the model's outputs over an optimizer step, before and with "
        "its weight, in units of the loss per nat; total is the norm of their weighted sum. The share of sequences "
        "that clipping holds back, where a loss clips.",
        [
            *_panels("Gradient of each component before its weight", "norm", norms, (0.0, None)),
            *_panels("Gradient of each component with its weight", "norm", weighted, (0.0, None)),
            Panel("Clipped sequences", "share", {"clipped_sequences": "clipped sequences"}, (0.0, 1.0)),
        ],
        history,
    )
    return pictures + layer_picture(history)


def layer_picture(history: History) -> Pictures:
    """Norm of the gradient in each layer over the steps, as a map."""
    keys = [key for key in _keys(history, part="grad_norm_layer/") if history.train[key].drawable]
    if not keys:
        return []
    keys.sort(key=lambda key: _depth(_after(key, "grad_norm_layer/")))
    steps = np.unique(np.concatenate([history.train[key].steps for key in keys]))
    values = np.stack([history.train[key].at(steps) for key in keys])
    positive = values[np.isfinite(values) & (values > 0)]
    wide = positive.size > 0 and positive.max() > 20 * positive.min()
    figure, (axes,) = new_figure(size=(8.4, 1.6 + 0.22 * min(len(keys), 60)))
    image = axes.pcolormesh(
        np.arange(steps.size + 1),
        np.arange(len(keys) + 1),
        np.where(values > 0, values, np.nan) if wide else values,
        cmap="cividis",
        norm=LogNorm() if wide else None,
    )
    ticks = np.arange(0, steps.size, -(-steps.size // 10))
    axes.set_xticks(ticks + 0.5, [f"{steps[tick]:g}" for tick in ticks])
    rows = range(0, len(keys), -(-len(keys) // 40))
    axes.set_yticks([row + 0.5 for row in rows], [label_text(_after(keys[row], "grad_norm_layer/")) for row in rows])
    finish_axes(axes, title="Gradient norm of each layer", y="layer")
    axes.grid(visible=False)
    # Powers of ten would be written as formulas, which are off.
    figure.colorbar(
        image, ax=axes, label="norm (loss per unit of weight)", format=FuncFormatter(lambda value, _: f"{value:g}")
    )
    caption = "Norm of the gradient of each layer's trained parameters, as the optimizer gets it; bright is large."
    return [(Picture("gradient-layers", "Where in the model the gradient is", caption, figure), set(keys))]


def _depth(layer: str) -> tuple[int, list[str]]:
    """From the embeddings to the output; numbers by value."""
    place = 0 if layer == "embedding" else 2 if layer == "head" else 1
    return place, [part.zfill(6) if part.isdigit() else part for part in layer.split(".")]


def _keys(history: History, *, suffix: str = "", part: str = "") -> list[str]:
    """Names of metrics that end in `suffix` and have `part` at their beginning or after a slash."""
    return [
        key
        for key in sorted(history.train)
        if key.endswith(suffix) and (key.startswith(part) or f"/{part}" in key) and history.train[key].drawable
    ]


def _after(key: str, part: str) -> str:
    """The name without the first `part`, with the composition in front of it, if there is one."""
    before, _, rest = key.partition(part)
    return before + rest


def _panels(
    title: str, unit: str, names: dict[str, str], limits: tuple[float | None, float | None] = (None, None)
) -> list[Panel]:
    """As many panels as it takes to draw all curves; what they show moves with the training alone."""
    items = list(names.items())
    return [
        Panel(title, unit, dict(items[start : start + _MOST_CURVES]), limits, evaluations=False)
        for start in range(0, len(items), _MOST_CURVES)
    ]
