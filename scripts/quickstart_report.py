"""What the quick start shows at the end: tables in the terminal, a figure, and a JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from trl_custom_losses.plotting.style import STYLES, Style, drawing, finish_axes, new_figure, save


@dataclass(frozen=True)
class Outcome:
    """One training run.

    Args:
        trainer: "DPO" or "GRPO".
        loss: The `loss_function` of the config.
        seed: Of the split, the base model and the training.
        before, after: Share (0..1) of held-out problems solved.
        seconds: Wall time of building the trainer and training.
        log: The Trainer's log entries, in order.
    """

    trainer: str
    loss: Any
    seed: int
    before: float
    after: float
    seconds: float
    log: list[dict[str, float]]


def describe_loss(loss: Any) -> str:
    """A short name for the table: "sigmoid + sft" for a composition, else the loss's type."""
    if isinstance(loss, str):
        loss = json.loads(loss) if loss.lstrip().startswith("{") else {"type": loss}
    parts = loss.get("components")
    return " + ".join(describe_loss(part) for part in parts) if parts else str(loss["type"])


def by_trainer(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes grouped by trainer, in the order of their first appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trainer, []).append(outcome)
    return groups


def print_tables(outcomes: Sequence[Outcome]) -> None:
    """Print every run, and the mean and spread over seeds where there are several."""
    console = Console()
    table = _new_table("change (points)", with_seed=True)
    for o in outcomes:
        table.add_row(
            o.trainer,
            describe_loss(o.loss),
            str(o.seed),
            f"{o.before:.1%}",
            f"{o.after:.1%}",
            f"{100 * (o.after - o.before):+.1f}",
            f"{o.seconds:.0f} s",
        )
    console.print("\nHeld-out accuracy: share of unseen problems answered exactly")
    console.print(table)
    n_seeds = len({o.seed for o in outcomes})
    if n_seeds < 2:
        return
    summary = _new_table("change", with_seed=False)
    for trainer, runs in by_trainer(outcomes).items():
        summary.add_row(
            trainer,
            describe_loss(runs[0].loss),
            _spread(runs, lambda o: 100 * o.before),
            _spread(runs, lambda o: 100 * o.after),
            _spread(runs, lambda o: 100 * (o.after - o.before), sign="+"),
            _spread(runs, lambda o: o.seconds, digits=0) + " s",
        )
    console.print(f"Mean ± standard deviation over {n_seeds} seeds: accuracy in %, change in points")
    console.print(summary)


def _new_table(change: str, *, with_seed: bool) -> Table:
    table = Table()
    table.add_column("trainer")
    table.add_column("loss")
    for column in [*(["seed"] if with_seed else []), "before", "after", change, "training"]:
        table.add_column(column, justify="right")
    return table


def _spread(runs: Sequence[Outcome], value: Callable[[Outcome], float], *, digits: int = 1, sign: str = "") -> str:
    values = [value(run) for run in runs]
    return f"{statistics.mean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def environment() -> dict[str, Any]:
    """Date, device and versions."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch_threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in packages},
    }


def write_results(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Write all numbers as JSON, with what is needed to compare them with another machine's."""
    content = environment() | {"runs": [asdict(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def write_figure(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw one panel for each trainer: the parts of DPO's loss, or GRPO's reward, over the optimizer steps."""
    groups = by_trainer(outcomes)
    with drawing():
        figure, panels = new_figure(1, len(groups), size=(5.6 * len(groups), 4.4))
        for axes, (trainer, runs) in zip(panels, groups.items(), strict=True):
            (_draw_reward if trainer == "GRPO" else _draw_losses)(axes, runs)
            finish_axes(axes, title=_panel_title(trainer, runs), y=axes.get_ylabel())
            axes.title.set_fontsize(10)
            axes.legend(loc="lower right" if trainer == "GRPO" else "best")
        n_seeds = len({o.seed for o in outcomes})
        note = "" if n_seeds == 1 else f" (mean of {n_seeds} seeds, band: lowest to highest)"
        figure.suptitle(f"Quick start: both trainers from the same base model{note}", fontsize=12)
        return save(figure, path)


def _panel_title(trainer: str, runs: Sequence[Outcome]) -> str:
    before, after = (statistics.mean(values) for values in ([o.before for o in runs], [o.after for o in runs]))
    return f"{trainer} with {describe_loss(runs[0].loss)}: held-out accuracy {before:.0%} → {after:.0%}"


def _draw_losses(axes: Axes, runs: Sequence[Outcome]) -> None:
    """The loss and, for a composition, each component before its weight."""
    components = sorted(key for key in runs[0].log[0] if key.endswith("_loss") and key != "total_loss")
    for style, key in zip(STYLES, ["loss", *components], strict=False):
        label = "total" if key == "loss" else f"{key.removesuffix('_loss')} component (unweighted)"
        _draw_curve(axes, runs, key, style, label=label)
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _draw_reward(axes: Axes, runs: Sequence[Outcome]) -> None:
    """The share of sampled training answers that are right, with its running mean."""
    _draw_curve(axes, runs, "reward", STYLES[0], label="reward: right among the sampled answers", scale=100)
    axes.axhline(
        100 * statistics.mean(o.before for o in runs),
        color=STYLES[2].color,
        linestyle=STYLES[2].dash,
        label="held-out accuracy before (greedy)",
    )
    axes.axhline(
        100 * statistics.mean(o.after for o in runs),
        color=STYLES[1].color,
        linestyle=STYLES[1].dash,
        label="held-out accuracy after (greedy)",
    )
    axes.set_ylabel("answers that are right (%)")
    axes.set_ylim(0, 100)


def _draw_curve(axes: Axes, runs: Sequence[Outcome], key: str, style: Style, *, label: str, scale: float = 1.0) -> None:
    """The mean over the runs, and for several runs a band from the lowest to the highest."""
    steps = [entry["step"] for entry in runs[0].log]
    curves = [[scale * entry[key] for entry in run.log] for run in runs]
    means = [statistics.mean(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, means, linestyle=style.dash, color=style.color, label=label)
    if len(runs) > 1:
        low, high = ([pick(values) for values in zip(*curves, strict=True)] for pick in (min, max))
        axes.fill_between(steps, low, high, color=style.color, alpha=0.15, linewidth=0)
