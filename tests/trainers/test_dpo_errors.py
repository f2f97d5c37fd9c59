"""Every mistake in a loss configuration is reported before a model loads, saying what was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor
from trl import DPOConfig

from tests import tiny
from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    LossConfigError,
    LossFunctionRegistry,
    PreferenceBatch,
    PreferenceLoss,
    UnknownLossError,
)

HERE = __name__


class UserLoss(PreferenceLoss):
    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs.logps, {}


class NeedsMargin(UserLoss):
    def __init__(self, *, margin: float) -> None:
        super().__init__()
        self.margin = margin


class NeedsReferenceTokens(UserLoss):
    requires = frozenset({"ref_per_token_logps"})


class NeedsTheMoon(UserLoss):
    requires = frozenset({"pooled_hiden"})


class ReducesOddly(UserLoss):
    reduction = "token_men"


class NeedsColumns(UserLoss):
    columns = ("weight", "safety")


NOT_A_LOSS = 3


def components(*types: str, **options: Any) -> dict[str, Any]:
    return {"type": "composed", "components": [{"type": type_, **options} for type_ in types]}


# What is wrong -> loss function, config options, what the message must say.
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown name": ("sigmod", {}, "no loss named 'sigmod'.*did you mean 'sigmoid'"),
    "unknown component": (components("sft", "sigmod"), {}, "'sigmod'.*did you mean 'sigmoid'"),
    "wrong family": ("grpo", {}, "'grpo' is a policy loss and cannot run in a DPO trainer"),
    "wrong family of a component": (components("sigmoid", "grpo"), {}, "'grpo' is a policy loss"),
    "unknown hyperparameter": ({"type": "sigmoid", "betta": 0.1}, {}, "no hyperparameter 'betta'.*did you mean 'beta'"),
    "hyperparameter of the trainer": ({"type": "sigmoid", "ld_alpha": 0.5}, {}, "'ld_alpha'.*trainer's config"),
    "no label smoothing for exo_pair": ("exo_pair", {}, "label_smoothing.*> ?0"),
    "missing hyperparameter": (f"{HERE}:NeedsMargin", {}, "needs the hyperparameter 'margin'"),
    "text for a number": ({"type": "sigmoid", "beta": "0.1"}, {}, "'beta'.*expected float, found '0.1'"),
    "truth value for a number": ({"type": "sigmoid", "beta": True}, {}, "'beta'.*expected float, found True"),
    "list for a number": ({"type": "sigmoid", "beta": [0.1]}, {}, "'beta'.*expected float"),
    "not a number": ({"type": "sigmoid", "beta": float("nan")}, {}, "'beta'.*finite"),
    "out of range": ({"type": "sigmoid", "beta": -1.0}, {}, "'beta'.*> ?0"),
    "out of range in the config": ("sigmoid", {"beta": 0.0}, "'beta'.*> ?0"),
    "not one of the choices": ({"type": "sigmoid", "f_divergence_type": "kl"}, {}, "f_divergence_type.*'kl'"),
    "no such module": ("no_such_module_at_all:Loss", {}, "could not import 'no_such_module_at_all'"),
    "no such attribute": (f"{HERE}:NeedsMargn", {}, "no 'NeedsMargn'.*did you mean 'NeedsMargin'"),
    "module that raises": ("failing_user_module:Loss", {}, "could not import.*RuntimeError: broken on purpose"),
    "malformed import path": ("a b:Loss", {}, "package.module:Loss"),
    "not a loss": (f"{HERE}:NOT_A_LOSS", {}, "must be a class or a function"),
    "no type": ({"beta": 0.1}, {}, "needs a 'type'"),
    "type is no text": ({"type": 3}, {}, "is a name, found 3"),
    "malformed JSON": ('{"type": "sigmoid"', {}, "not valid JSON"),
    "no components": ({"type": "composed", "components": []}, {}, "at least one"),
    "components of one name": (components("sft", "sft"), {}, "share the name 'sft'"),
    "component without type": ({"type": "composed", "components": [{"weight": 1.0}]}, {}, "component 1.*'type'"),
    "weight that is no number": (components("sft", weight="1"), {}, "component 'sft', 'weight'.*found '1'"),
    "infinite weight": (
        components("sft", weight=float("inf")),
        {},
        "component 'sft', 'weight'.*found inf",
    ),
    "unknown requirement": (f"{HERE}:NeedsTheMoon", {}, "pooled_hiden.*did you mean 'pooled_hidden'"),
    "unknown reduction": (f"{HERE}:ReducesOddly", {}, "token_men.*did you mean 'token_mean'"),
    "reference tokens and precomputed sums": (
        f"{HERE}:NeedsReferenceTokens",
        {"precompute_ref_log_probs": True},
        "precompute_ref_log_probs",
    ),
    "reference tokens and precomputed sums in a component": (
        components("sft", f"{HERE}:NeedsReferenceTokens"),
        {"precompute_ref_log_probs": True},
        "NeedsReferenceTokens.*precompute_ref_log_probs",
    ),
    "loss_type too": ("sigmoid", {"loss_type": ["hinge"]}, "`loss_type=.*hinge.*both choose"),
    "loss_type as text too": ("sigmoid", {"loss_type": "hinge"}, "`loss_type=.*hinge.*both choose"),
    "loss_weights too": ("sigmoid", {"loss_weights": [1.0]}, "`loss_weights=.*both choose"),
    "f-divergence without meaning": ("apo_zero", {"f_divergence_type": "js_divergence"}, "f_divergence_type.*apo_zero"),
    "f-divergence without meaning for a component": (
        components("sigmoid", "nca_pair"),
        {"f_divergence_type": "forward_kl"},
        "f_divergence_type.*nca_pair",
    ),
    "weighting of coupled pairs": ("aot", {"use_weighting": True}, "use_weighting.*aot"),
    "weighting of coupled pairs in a component": (
        components("sft", "aot_unpaired"),
        {"use_weighting": True},
        "use_weighting.*aot_unpaired",
    ),
}


@pytest.fixture
def failing_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_user_module.py").write_text("raise RuntimeError('broken on purpose')\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_config_refuses(mistake: str, run_arguments: dict, failing_module: None) -> None:
    loss_function, options, message = MISTAKES[mistake]
    with pytest.raises(LossConfigError, match=f"(?s){message}"):
        CustomDPOConfig(**run_arguments, **options, loss_function=loss_function)


@pytest.mark.parametrize("config_class", [DPOConfig, CustomDPOConfig])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_trainer_refuses_before_a_model_loads(
    mistake: str, config_class: type, run_arguments: dict, failing_module: None
) -> None:
    loss_function, options, message = MISTAKES[mistake]
    with pytest.raises(LossConfigError, match=f"(?s){message}"):
        CustomDPOTrainer(
            "/nonexistent",
            args=config_class(**run_arguments, **options),
            train_dataset=tiny.preference_data(),
            loss_function=loss_function,
        )


def test_an_unknown_name_is_a_look_up_error_too() -> None:
    with pytest.raises(UnknownLossError) as caught:
        LossFunctionRegistry.get("sigmod")
    assert isinstance(caught.value, KeyError) and "sigmoid_norm" in str(caught.value)


def policy_loss(batch: Any, outputs: Any) -> Any: ...


policy_loss.family = "policy"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("loss_function", "message"),
    [(UserLoss, "found the class UserLoss"), (3, "found 3"), (policy_loss, "policy loss"), ([], r"found \[\]")],
    ids=["class", "number", "function of the other family", "list"],
)
def test_the_trainer_refuses_what_is_no_loss(loss_function: Any, message: str, run_arguments: dict) -> None:
    config = DPOConfig(**run_arguments)
    with pytest.raises(LossConfigError, match=message):
        CustomDPOTrainer("/nonexistent", args=config, train_dataset=tiny.preference_data(), loss_function=loss_function)


def test_a_loss_given_twice_is_refused(run_arguments: dict) -> None:
    config = CustomDPOConfig(**run_arguments, loss_function="sigmoid")
    with pytest.raises(LossConfigError, match=r"(?s)given twice.*'hinge'.*'sigmoid'"):
        CustomDPOTrainer("/nonexistent", args=config, train_dataset=tiny.preference_data(), loss_function="hinge")


def streamed(data: Dataset) -> IterableDataset:
    def examples() -> Iterator[dict[str, Any]]:
        yield from data

    return IterableDataset.from_generator(examples)


GOOD = tiny.preference_data(4).add_column("safety", [0, 1, 0, 1])
BAD = tiny.preference_data(4)


@pytest.mark.parametrize(
    ("train", "evaluation", "where"),
    [
        (BAD, None, "`train_dataset`"),
        (BAD.to_iterable_dataset(), None, "`train_dataset`"),
        (streamed(BAD), None, "`train_dataset`"),
        (GOOD, BAD, "`eval_dataset`"),
        (GOOD, streamed(BAD), "`eval_dataset`"),
        (GOOD, {"good": GOOD, "bad": BAD}, r"`eval_dataset\['bad'\]`"),
        (GOOD, DatasetDict(good=GOOD, bad=BAD), r"`eval_dataset\['bad'\]`"),
    ],
)
def test_a_data_set_without_the_column_is_refused(train: Any, evaluation: Any, where: str, run_arguments: dict) -> None:
    config = CustomDPOConfig(**run_arguments, max_steps=1, loss_function=f"{HERE}:NeedsColumns")
    with pytest.raises(LossConfigError, match=f"(?s)column 'safety', which {where} lacks.*it has .*weight"):
        CustomDPOTrainer("/nonexistent", args=config, train_dataset=train, eval_dataset=evaluation)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry as it is now, back again after the test."""
    names = LossFunctionRegistry.names()  # loads everything, or the copy would be all there ever is
    assert "sigmoid" in names
    monkeypatch.setattr(LossFunctionRegistry, "_functions", dict(LossFunctionRegistry._functions))


def test_a_name_is_registered_once(registry: None) -> None:
    def mine(batch: PreferenceBatch, outputs: Any) -> Any: ...

    LossFunctionRegistry.register("my_own_loss")(mine)
    with pytest.raises(LossConfigError, match="'my_own_loss' is already registered"):
        LossFunctionRegistry.register("my_own_loss")(mine)
    with pytest.raises(LossConfigError, match="'sigmoid' is already registered"):
        LossFunctionRegistry.register("sigmoid")(mine)
    with pytest.raises(LossConfigError, match="unknown facts"):
        LossFunctionRegistry.register("other_loss", colums=("weight",))(mine)


def test_a_correct_configuration_passes_on_to_the_model(run_arguments: dict) -> None:
    """What the refusals above prove: with nothing wrong, the next error is the missing model."""
    config = CustomDPOConfig(**run_arguments, loss_function=f"{HERE}:NeedsColumns")
    with pytest.raises(OSError, match="nonexistent"):
        CustomDPOTrainer("/nonexistent", args=config, train_dataset=GOOD, eval_dataset={"good": GOOD})
