"""Pictures of losses from the registry: the drawn numbers against the formulas, and what has no picture."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.example_losses import restored_registry
from trl_custom_losses import LossConfigError, LossFunctionRegistry, PolicyLoss, PreferenceLoss
from trl_custom_losses.plotting import (
    drawable_losses,
    losses,
    plot_family,
    plot_loss,
    plot_losses,
    why_not_drawable,
)
from trl_custom_losses.plotting.curves import drawable, policy_curve, preference_curve


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What would be written, as figures."""
    kept: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        kept.append(figure)
        return path

    monkeypatch.setattr(losses, "save", keep)
    return kept


@pytest.fixture
def registry() -> Iterator[None]:
    with restored_registry():
        yield


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# Preference losses

B = 0.1
FORMULAS = {
    "sigmoid": lambda m: (np.log1p(np.exp(-B * m)), -B * _sigmoid(-B * m), B * _sigmoid(-B * m)),
    "hinge": lambda m: (np.maximum(0, 1 - B * m), -B * (B * m < 1), B * (B * m < 1)),
    "ipo": lambda m: ((m - 5) ** 2, 2 * (m - 5), -2 * (m - 5)),
    "apo_zero": lambda m: (
        1 - _sigmoid(B * m / 2) + _sigmoid(-B * m / 2),
        -B * _sigmoid(B * m / 2) * _sigmoid(-B * m / 2),
        B * _sigmoid(B * m / 2) * _sigmoid(-B * m / 2),
    ),
    "sppo_hard": lambda m: ((m / 2 - 5) ** 2 + (5 - m / 2) ** 2, m - 10, 10 - m),
    "sft": lambda m: (31 - m / 2, -1 + 0 * m, 0 * m),  # the reference's log-probability is -31
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_preference_loss_is_drawn_against_the_margin(name: str) -> None:
    curve = preference_curve(drawable(name), points=42)  # none of them on a kink
    assert (curve.margins[0], curve.margins[-1]) == pytest.approx((-60.0, 60.0))
    values, chosen, rejected = FORMULAS[name](curve.margins)
    np.testing.assert_allclose(curve.values, values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(curve.chosen, chosen, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(curve.rejected, rejected, rtol=1e-9, atol=1e-12)


def test_the_reach_follows_beta() -> None:
    assert preference_curve(drawable({"type": "sigmoid", "beta": 2.0}), points=3).margins.tolist() == [-3.0, 0.0, 3.0]
    assert preference_curve(drawable("sigmoid"), 7.0, points=2).margins.tolist() == [-7.0, 7.0]
    assert preference_curve(drawable("sft"), points=2).beta is None


def test_a_composition_is_drawn_as_its_weighted_sum() -> None:
    parts = [{"type": "sigmoid", "weight": 2.0}, {"type": "sft", "weight": 0.5}]
    curve = preference_curve(drawable({"type": "composed", "components": parts}), points=9)
    expected = [
        2.0 * first + 0.5 * second
        for first, second in zip(FORMULAS["sigmoid"](curve.margins), FORMULAS["sft"](curve.margins), strict=True)
    ]
    np.testing.assert_allclose([curve.values, curve.chosen, curve.rejected], expected)


def test_hyperparameters_without_default_are_the_example_unless_given() -> None:
    assert drawable("exo_pair").label_smoothing == LossFunctionRegistry.get("exo_pair").example["label_smoothing"]
    assert drawable({"type": "exo_pair", "label_smoothing": 0.05}).label_smoothing == 0.05


def test_an_example_gives_way_to_another_name_of_the_same_hyperparameter(registry: None) -> None:
    class Steep(PreferenceLoss):
        aliases = {"steepness": "slope"}
        example = {"slope": 2.0}

        def __init__(self, *, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, batch, model_outputs):
            return -self.slope * model_outputs.logps[: batch.num_pairs], {}

    LossFunctionRegistry.register("steep")(Steep)
    assert drawable("steep").slope == 2.0
    assert drawable({"type": "steep", "steepness": 3.0}).slope == 3.0


def test_a_preference_picture_has_the_curves_and_their_units(figures: list[Figure], tmp_path: Path) -> None:
    plot_loss("sigmoid", tmp_path / "x.png")
    value, gradient = figures[0].axes
    margins, drawn = value.lines[0].get_data()
    np.testing.assert_allclose(drawn, np.log1p(np.exp(-B * margins)))
    np.testing.assert_allclose(gradient.lines[0].get_ydata(), -B * _sigmoid(-B * margins))
    np.testing.assert_allclose(gradient.lines[1].get_ydata(), B * _sigmoid(-B * margins))
    assert "nats" in value.get_xlabel() and "per nat" in gradient.get_ylabel()
    top = value.child_axes[0]
    assert top.get_xlabel() == "beta x margin (beta = 0.1)"
    assert [text.get_text() for text in gradient.get_legend().get_texts()] == [
        "by the chosen log-ratio",
        "by the rejected log-ratio",
    ]
    assert gradient.lines[0].get_linestyle() != gradient.lines[1].get_linestyle()  # told apart without colour


# Policy losses


def test_a_surrogate_is_drawn_against_the_ratio() -> None:
    curve = policy_curve(drawable({"type": "grpo", "epsilon": 0.2, "epsilon_high": 0.3}), points=50)
    r = curve.ratios
    assert (r[0], r[-1]) == pytest.approx((0.02, 3.0))
    np.testing.assert_allclose(curve.values[1.0], -np.minimum(r, 1.3), rtol=1e-9)
    np.testing.assert_allclose(curve.values[-1.0], np.maximum(r, 0.8), rtol=1e-9)
    np.testing.assert_allclose(curve.gradients[1.0], np.where(r < 1.3, -r, 0), rtol=1e-9)
    np.testing.assert_allclose(curve.gradients[-1.0], np.where(r > 0.8, r, 0), rtol=1e-9)


def test_gradients_are_the_losses_own_also_where_weights_are_detached() -> None:
    curve = policy_curve(drawable({"type": "cispo", "epsilon_high": 2.0}), points=40)
    weight = np.minimum(curve.ratios, 2.0)
    np.testing.assert_allclose(curve.values[1.0], -weight * (np.log(curve.ratios) - 2), rtol=1e-9)
    np.testing.assert_allclose(curve.gradients[1.0], -weight, rtol=1e-9)


def test_the_average_over_tokens_is_not_in_the_picture() -> None:
    fixed = policy_curve(drawable({"type": "dr_grpo", "max_completion_length": 50}), points=5)
    np.testing.assert_allclose(fixed.values[1.0], policy_curve(drawable("grpo"), points=5).values[1.0])


def test_a_policy_picture_has_both_advantages(figures: list[Figure], tmp_path: Path) -> None:
    plot_loss("dapo", tmp_path / "x.png")
    value, gradient = figures[0].axes
    for axes in (value, gradient):
        assert [line.get_label() for line in axes.lines[:2]] == ["advantage +1", "advantage -1"]
    ratios, drawn = value.lines[1].get_data()
    np.testing.assert_allclose(drawn, np.maximum(ratios, 0.8), rtol=1e-9)
    assert "importance ratio" in value.get_xlabel()


def test_a_loss_of_columns_is_drawn_for_a_row_of_its_examples() -> None:
    loss = drawable({"type": "safe_dpo", "beta": 0.1, "delta": 10.0})
    curve = preference_curve(loss, points=3)
    # Chosen safe, rejected unsafe: -log sigmoid(beta margin - 10).
    assert curve.values[1] == pytest.approx(math.log1p(math.exp(10.0)))
    assert "for a row of chosen_unsafe = 0, rejected_unsafe = 1" in losses._subtitle(loss)


def test_a_loss_that_compares_pairs_is_drawn_for_a_pair_alone() -> None:
    loss = drawable({"type": "aot", "beta": 0.1})
    alone, sigmoid = preference_curve(loss, points=5), preference_curve(drawable("sigmoid"), points=5)
    np.testing.assert_allclose(alone.values, sigmoid.values)
    assert "of a pair alone" in losses._subtitle(loss) and "of a pair alone" not in losses._subtitle(
        drawable("sigmoid")
    )


# What has no picture


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("safety", "columns chosen_unsafe, rejected_unsafe"),
        ("consistency", "needs sequence_hidden"),
        ("dynamic_grpo", "whole generation batches"),
        ("diversity", "needs pooled_hidden"),
    ],
)
def test_losses_without_a_picture_say_why(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(LossConfigError, match=f"'{name}' has no picture: it .*{reason}"):
        plot_loss(name, tmp_path / "x.png")
    assert reason in why_not_drawable(name)
    assert not list(tmp_path.iterdir())


def test_what_can_be_drawn_follows_what_a_loss_declares(registry: None) -> None:
    class Plain(PolicyLoss):
        def forward(self, batch, model_outputs):
            return -batch.advantages * model_outputs.per_token_logps, {}

    class Auxiliary(Plain):
        surrogate = False

    class Constant(Plain):
        def forward(self, batch, model_outputs):
            return 0.0 * batch.advantages, {}

    for loss in (Plain, Auxiliary, Constant):
        LossFunctionRegistry.register(loss.__name__.lower())(loss)
    assert "plain" in drawable_losses("policy") and "auxiliary" not in drawable_losses()
    assert "no surrogate" in why_not_drawable("auxiliary")
    with pytest.raises(LossConfigError, match="does not depend on the log-probabilities"):
        policy_curve(drawable("constant"), points=2)


def test_every_loss_can_be_drawn_or_says_why_not() -> None:
    drawn = drawable_losses()
    assert all(_reason(name) for name in LossFunctionRegistry.names() if name not in drawn)
    assert not any(_reason(name) for name in drawn)
    assert sorted(drawn) == sorted({*drawable_losses("preference"), *drawable_losses("policy")})
    assert {"sigmoid", "ipo", "grpo", "cispo", "composed"} <= set(drawn)


def _reason(name: str) -> str:
    try:
        return why_not_drawable(name)
    except LossConfigError as error:
        return str(error)


def test_mistakes_in_the_configuration_are_told(tmp_path: Path) -> None:
    with pytest.raises(LossConfigError, match="sigmoid"):
        plot_loss("sigmiod", tmp_path / "x.png")
    with pytest.raises(LossConfigError, match="beta"):
        plot_loss({"type": "sigmoid", "beta": "much"}, tmp_path / "x.png")


# Files


def test_several_losses_are_written_or_none(tmp_path: Path) -> None:
    with pytest.raises(LossConfigError, match="'safety' has no picture"):
        plot_losses(["sigmoid", "safety"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    module = "trl_custom_losses.losses.preference.sigmoid:SigmoidLoss"
    paths = plot_losses(["sigmoid", {"type": "sigmoid", "beta": 0.5}, module], tmp_path / "some")
    assert [path.name for path in paths] == [
        "sigmoid.png",
        "sigmoid-2.png",
        f"{module.replace('.', '_').replace(':', '_')}.png",
    ]
    assert all(imread(path).std() > 0.05 for path in paths)


@pytest.mark.parametrize("family", ["preference", "policy"])
def test_a_family_is_drawn_side_by_side(family: str, figures: list[Figure], tmp_path: Path) -> None:
    plot_family(family, tmp_path / "x.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    expected = [name for name in drawable_losses(family) if not drawable(name).composite]
    assert [title for title in titles if title] == expected
    assert len(figures[0].axes) == 2 * len(expected)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()]


# The optional package


def test_without_matplotlib_the_import_says_what_to_install() -> None:
    program = """
import sys
import trl_custom_losses
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    import trl_custom_losses.plotting
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install 'trl-custom-losses[plot]'" in result.stdout and "matplotlib" in result.stdout


@pytest.mark.parametrize("config", [3, None, ["sigmoid"]])
def test_what_is_no_loss_is_told(config: object, tmp_path: Path) -> None:
    with pytest.raises(LossConfigError, match="a loss was needed, as a name or a dict with 'type'; found"):
        plot_loss(config, tmp_path / "x.png")


def test_a_path_that_cannot_be_written_is_one_readable_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x.png"):
        with pytest.raises(LossConfigError, match=f"the picture cannot be written to {path}: "):
            plot_loss("hinge", path)


def _below(config: object, figures: list[Figure], tmp_path: Path) -> str:
    plot_loss(config, tmp_path / "x.png")
    return " ".join(figures[-1].get_supxlabel().split())  # however its lines break


def test_the_text_below_tells_weights_schedules_and_bounds_in_force(figures: list[Figure], tmp_path: Path) -> None:
    beta = {"schedule": "linear", "start": 0.5, "end": 0.1, "total_steps": 10}
    parts = [{"type": "hinge", "name": "pref", "weight": 2.0, "beta": beta}, {"type": "sft", "weight": 0.25}]
    text = _below({"type": "composed", "components": parts}, figures, tmp_path)
    assert "'pref': 2.0" in text and "'sft': 0.25" in text
    assert "pref: f_div" in text and "beta = linear(total_steps=10, start=0.5, end=0.1)" in text
    assert "value of the first step" in text
    assert "schedul" not in _below("hinge", figures, tmp_path)
    assert "epsilon = 0.3, epsilon_high = 0.3" in _below({"type": "cispo", "epsilon": 0.3}, figures, tmp_path)


@pytest.mark.parametrize(("name", "depends"), [("sft", True), ("perplexity", True), ("sigmoid", False), ("ipo", False)])
def test_numbers_that_depend_on_the_assumed_reference_say_so(
    name: str, depends: bool, figures: list[Figure], tmp_path: Path
) -> None:
    assert ("-31 nats under the reference" in _below(name, figures, tmp_path)) is depends
