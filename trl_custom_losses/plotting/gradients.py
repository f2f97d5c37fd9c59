"""Pictures of gradients: of a loss's components, and of the model's layers."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter

from .history import History
from .lines import spread_out
from .picture import Panel, Picture, Pictures, keys, panels, picture_of
from .style import finish_axes, label_text, new_figure

_NORM = "norm (loss per nat)"


def gradient_pictures(history: History) -> Pictures:
    """Cosines between components' gradients, their norms, clipped sequences, and norms by layer."""
    cosines = {
        key: (_before(key, "grad_cosine/"), _after(key, "grad_cosine/").replace("/", " and "))
        for key in keys(history, part="grad_cosine/")
    }
    pictures = picture_of(
        "gradient-cosines",
        "Whether the components pull together",
        "Cosine between the gradients of two components with respect to the model's outputs over an optimizer step: 1 "
        "if they agree, 0 if they have nothing to do with each other, below 0 if they pull apart.",
        _panels_by_place("Cosine between two components' gradients", "cosine", cosines, (-1.0, 1.0)),
        history,
    )
    for picture, _ in pictures:
        for axes in picture.figure.axes:
            axes.axhline(0.0, color="#000000", linewidth=0.8)
    norms, weighted = (
        {key: (_before(key, part), _after(key, part)) for key in keys(history, part=part)}
        for part in ("grad_norm/", "grad_norm_weighted/")
    )
    if weighted:
        weighted |= {key: norms.pop(key) for key in list(norms) if key.endswith("grad_norm/total")}
    clipped = {key: key for key in keys(history, part="clipped_sequences", suffix="clipped_sequences")}
    pictures += picture_of(
        "gradient-norms",
        "How strongly each component pulls",
        "Norm of each component's gradient with respect to the model's outputs over an optimizer step, before and with "
        "its weight; total is the norm of their weighted sum. The share of sequences "
        "that clipping holds back, where a loss clips.",
        [
            *_panels_by_place("Gradient of each component before its weight", _NORM, norms, (0.0, None)),
            *_panels_by_place("Gradient of each component with its weight", _NORM, weighted, (0.0, None)),
            *panels("Clipped sequences", "share", clipped, (0.0, 1.0)),
        ],
        history,
    )
    return pictures + layer_picture(history)


def layer_picture(history: History) -> Pictures:
    """Norm of the gradient in each layer over the steps, as a map."""
    layers = [key for key in keys(history, part="grad_norm_layer/") if history.train[key].drawable]
    if not layers:
        return []
    layers.sort(key=lambda key: _depth(_after(key, "grad_norm_layer/")))
    steps = np.unique(np.concatenate([history.train[key].steps for key in layers]))
    values = np.stack([history.train[key].at(steps) for key in layers])
    shown = spread_out(steps.size)
    steps, values = steps[shown], values[:, shown]
    positive = values[np.isfinite(values) & (values > 0)]
    wide = positive.size > 0 and positive.max() > 20 * positive.min()
    figure, (axes,) = new_figure(size=(8.4, max(3.2, 1.6 + 0.22 * min(len(layers), 60))))
    image = axes.pcolormesh(
        np.arange(steps.size + 1),
        np.arange(len(layers) + 1),
        np.where(values > 0, values, np.nan) if wide else values,
        cmap="cividis",
        norm=LogNorm() if wide else None,
    )
    ticks = np.arange(0, steps.size, -(-steps.size // 10))
    axes.set_xticks(ticks + 0.5, [f"{steps[tick]:g}" for tick in ticks])
    rows = range(0, len(layers), -(-len(layers) // 40))
    axes.set_yticks([row + 0.5 for row in rows], [label_text(_after(layers[row], "grad_norm_layer/")) for row in rows])
    finish_axes(axes, title="Gradient norm of each layer", y="layer")
    axes.grid(visible=False)
    # Powers of ten would be written as formulas, which are off.
    bar = figure.colorbar(
        image, ax=axes, label="norm (loss per unit of weight)", format=FuncFormatter(lambda value, _: f"{value:g}")
    )
    bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _labelled(value) else ""))
    caption = "Norm of the gradient of each layer's trained parameters, as the optimizer gets it; bright is large."
    return [(Picture("gradient-layers", "Where in the model the gradient is", caption, figure), set(layers))]


def _labelled(value: float) -> bool:
    """Whether a value between two powers of ten has room for a label: twice or five times the lower one."""
    return value > 0 and round(value / 10 ** math.floor(math.log10(value)), 6) in (2, 5)


def _depth(layer: str) -> tuple[int, list[str]]:
    """From the embeddings to the output; numbers by value."""
    place = 0 if layer == "embedding" else 2 if layer == "head" else 1
    return place, [part.zfill(6) if part.isdigit() else part for part in layer.split(".")]


def _after(key: str, part: str) -> str:
    """The name behind the first `part`."""
    return key.partition(part)[2]


def _before(key: str, part: str) -> str:
    """The composition in front of the first `part`; empty if there is none."""
    return key.partition(part)[0].rstrip("/")


def _panels_by_place(
    title: str, unit: str, names: dict[str, tuple[str, str]], limits: tuple[float | None, float | None]
) -> list[Panel]:
    """Panels for each composition, whose names may be those of another; `names` has metric -> composition and label."""
    found_panels = []
    for place in sorted({place for place, _ in names.values()}):
        own = {key: label for key, (found, label) in names.items() if found == place}
        found_panels += panels(f"{title}, in {label_text(place)}" if place else title, unit, own, limits)
    return found_panels
