"""Pictures of what the training does: rewards and margins, completions, distance from the reference, optimisation."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from .history import History, Series
from .lines import draw_band, draw_evaluations, draw_series, evaluation_entries, running_mean, window_of
from .picture import Panel, Picture, Pictures, picture_of, smoothed
from .style import finish_axes, label_text, legend_beside, new_figure, style

_MOST_REWARDS = 8
_MOST_OTHERS = 24
#: What needs no picture.
_PLAIN_COUNTS = ("num_tokens", "num_input_tokens_seen")


def margin_picture(history: History) -> Pictures:
    """The margins of DPO: mean, spread and range over pairs, and accuracy."""
    name = "rewards/margins"
    pictures = []
    if name in history.train and history.train[name].drawable:
        figure, (axes,) = new_figure(size=(8.4, 3.9))
        shown = draw_spread(
            axes, history, name, f"{name}/std", (f"{name}/min", f"{name}/max"), "mean over pairs", "pairs"
        )
        axes.axhline(0.0, color="#000000", linewidth=0.8)
        finish_axes(axes, title="Margin: reward of the chosen minus that of the rejected completion", y="beta x nats")
        caption = (
            "The implicit reward is beta times the log-ratio of policy to reference; beta is that of the loss's first "
            "component that has one, as scheduled. Pairs above 0 are ranked as the "
            "data says. Dark band: mean plus and minus one standard deviation over the pairs since the last log; pale "
            "band: lowest to highest pair."
        )
        picture = Picture("margins", "How far chosen and rejected are apart", caption, figure)
        pictures.append((picture, shown))
    return pictures + picture_of(
        "rewards",
        "What happens to each side of the pairs",
        "Implicit rewards of both completions (beta times log-ratio) and log-probabilities, nats; if both fall while "
        "the margin grows, the chosen completions become less likely too. Accuracy: share of pairs with a margin above "
        "0.",
        [
            Panel("Implicit rewards", "beta x nats", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
            Panel("Log-probability of a completion", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
            Panel("Pairs ranked as the data says", "share of pairs", {"rewards/accuracies": "accuracy"}, (0.0, 1.0)),
        ],
        history,
    )


def reward_pictures(history: History) -> Pictures:
    """The rewards of GRPO: the total and each reward function, with their spread."""
    functions = [key.removesuffix("/mean") for key in sorted(history.train) if _is_function(key)]
    names = [("reward", "reward_std", "Total reward")] if "reward" in history.train else []
    names += [
        (f"{key}/mean", f"{key}/std", f"Reward of {label_text(key.removeprefix('rewards/'))}")
        for key in functions[:_MOST_REWARDS]
    ]
    if len(names) == 2:  # the one function's reward is the total
        names = names[:1]
    names = [row for row in names if history.train[row[0]].drawable]
    if not names:
        return []
    figure, all_axes = new_figure(len(names), 1, size=(8.4, 0.6 + 2.7 * len(names)))
    shown: set[str] = set()
    for axes, (mean, spread, title) in zip(all_axes, names, strict=True):
        shown |= draw_spread(axes, history, mean, spread, None, "mean", "completions")
        shown |= {f"{key}/{end}" for key in functions for end in ("mean", "std")} if len(names) == 1 else set()
        finish_axes(axes, title=title, y="reward")
    caption = (
        "Mean over the sampled completions; band: plus and minus the logged standard deviation (of the total, "
        "the mean of those within the prompts' groups; of a function, over all completions). "
        "The unit is that of the reward functions." + smoothed(history, shown)
    )
    flat = picture_of(
        "groups",
        "Prompts that teach nothing",
        "Share of prompts whose completions all have the same reward: their advantages are 0.",
        [Panel("Groups without any spread", "share", {"frac_reward_zero_std": "groups"}, (0.0, 1.0))],
        history,
    )
    return [(Picture("reward", "Rewards of the sampled completions", caption, figure), shown), *flat]


def draw_spread(
    axes: Axes, history: History, mean: str, spread: str, ends: tuple[str, str] | None, label: str, of: str
) -> set[str]:
    """Draw a mean with its band, the range, evaluations and a legend; returns the metrics used.

    Args:
        axes: To draw on.
        history: Of the run.
        mean, spread: Metrics.
        ends: Metrics of the lowest and highest value, if any.
        label: Of the mean.
        of: What the spread is over, for the legend.
    """
    series, look = history.train[mean], style(0)
    shown = {mean}
    window = window_of(series.values.size)

    def at(name: str) -> np.ndarray | None:
        found: Series | None = history.train.get(name)
        if found is None or not found.drawable:
            return None
        shown.add(name)
        return running_mean(found.at(series.steps), window)

    low, high = (at(name) for name in ends) if ends else (None, None)
    if low is not None and high is not None:
        draw_band(axes, series.steps, low, high, look, alpha=0.15, label=f"lowest to highest of the {of}")
        axes.plot(series.steps, low, color=look.color, linewidth=0.6, linestyle=":")
        axes.plot(series.steps, high, color=look.color, linewidth=0.6, linestyle=":")
    deviation = at(spread)
    if deviation is not None:
        middle = running_mean(series.values, window)
        label_of_band = f"standard deviation over {of}"
        draw_band(axes, series.steps, middle - deviation, middle + deviation, look, alpha=0.3, label=label_of_band)
    draw_series(axes, series, look, label)
    draw_evaluations(axes, history, mean, style(1))
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    legend_beside(axes, entries + evaluation_entries(history, [mean]))
    return shown


def completion_picture(history: History) -> Pictures:
    """Lengths of sampled completions."""
    part = "completions/"
    lengths = {f"{part}max_length": "longest", f"{part}mean_length": "mean", f"{part}min_length": "shortest"}
    return picture_of(
        "completions",
        "Sampled completions",
        "Lengths in tokens, and the share of completions that were cut off at the longest length allowed.",
        [
            Panel("Length of the completions", "tokens", lengths, (0.0, None)),
            Panel("Cut off before their end", "share", {f"{part}clipped_ratio": "cut off"}, (0.0, 1.0)),
        ],
        history,
    )


def drift_picture(history: History) -> Pictures:
    """Entropy, the distance from the reference, and from the policy that generated."""
    part = "clip_ratio/"
    clipped = {f"{part}low_mean": "below", f"{part}high_mean": "above", f"{part}region_mean": "either"}
    return picture_of(
        "drift",
        "How the policy drifts",
        "Entropy: mean over tokens of that of the policy's next-token distribution; towards 0, it always says the "
        "same. KL: estimate of the distance to the reference, per token. Accuracy: share of the chosen completions' "
        "tokens that the policy ranks first.",
        [
            Panel("Entropy", "nats per token", {"entropy": "entropy"}, (0.0, None)),
            Panel("KL to the reference", "nats per token", {"kl": "KL"}, (0.0, None)),
            Panel("Tokens whose importance ratio is beyond the clip range", "share of tokens", clipped, (0.0, None)),
            Panel("Tokens ranked first", "share of tokens", {"mean_token_accuracy": "accuracy"}, (0.0, 1.0)),
        ],
        history,
    )


def optimisation_picture(history: History) -> Pictures:
    """Learning rate and gradient norm."""
    return picture_of(
        "optimisation",
        "Learning rate and gradient norm",
        "The norm is that of the gradient of all parameters, before the Trainer clips it.",
        [
            Panel("Learning rate", "learning rate", {"learning_rate": "learning rate"}, (0.0, None)),
            Panel("Norm of the model's gradient", "norm", {"grad_norm": "gradient"}, (0.0, None)),
        ],
        history,
    )


def other_picture(history: History, shown: set[str]) -> Pictures:
    """Everything else that was logged, small."""
    names = [
        name
        for name in sorted(history.train)
        if name not in shown and name not in _PLAIN_COUNTS and history.train[name].drawable
    ]
    constant = [name for name in names if not np.nanstd(history.train[name].values) and not history.evaluated(name)]
    names = [name for name in names if name not in constant]
    left_out = names[_MOST_OTHERS:]
    names = names[:_MOST_OTHERS]
    if not names:
        return []
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, all_axes = new_figure(rows, columns, size=(8.4, 0.5 + 1.9 * rows))
    titles: list[str] = []
    for axes, name in zip(all_axes, names, strict=False):
        short = label_text(name, 28)
        same = sum(title.startswith(short) for title in titles)  # names that differ in their middles
        titles.append(f"{short} ({same + 1})" if same else short)
        draw_series(axes, history.train[name], style(0), "")
        draw_evaluations(axes, history, name, style(1))
        finish_axes(axes)
        axes.set_xlabel("")
        axes.set_title(titles[-1], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in all_axes[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=10)
    caption = "Everything else that was logged, each in its own unit; the table has the numbers."
    if constant:
        caption += f" Not drawn: {len(constant)} that never changed."
    if left_out:
        caption += f" Nor {len(left_out)} more, for lack of room." if constant else f" Not drawn: {len(left_out)} more."
    return [(Picture("others", "Other metrics", caption, figure), {*names, *left_out})]


def _is_function(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")
