from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, LossFunctionRegistry
from trl_custom_losses.losses.auxiliary import PerplexityLoss
from trl_custom_losses.losses.composite import MultiObjectiveDPOLoss
from trl_custom_losses.losses.policy import GRPOLoss
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.registry import BuildContext
from trl_custom_losses.testing import random_data


def scorer(texts: list[str]) -> list[float]:
    return [0.0] * len(texts)


def other_scorer(texts: list[str]) -> list[float]:
    return [1.0] * len(texts)


SCORER, OTHER = f"{__name__}:scorer", f"{__name__}:other_scorer"


def _build(auxiliary_losses: Any, family: Any = "preference", **options: Any) -> MultiObjectiveDPOLoss:
    config = {"type": "multi_objective_dpo", "auxiliary_losses": auxiliary_losses, **options}
    loss = LossFunctionRegistry.build(config, family=family)
    assert isinstance(loss, MultiObjectiveDPOLoss)
    return loss


def _run(loss: MultiObjectiveDPOLoss) -> tuple[Tensor, dict]:
    batch, outputs = random_data("preference").build(loss)
    raw, metrics = loss(batch, outputs)
    return reduce_loss(loss, raw, batch), dict(metrics)


def test_adds_weighted_auxiliaries_to_the_main_loss() -> None:
    threshold = {"threshold": -0.5}
    loss = _build(
        {"perplexity": {"completions": "both"}, "consistency": threshold, "safety": {}},
        auxiliary_weights={"perplexity": 0.1, "consistency": 0.05},
    )
    parts = {
        "sigmoid": 1.0,
        "perplexity": 0.1,
        "consistency": 0.05,
        "safety": 1.0,
    }
    options = {"perplexity": {"completions": "both"}, "consistency": threshold}
    data = random_data("preference")
    singles = {name: LossFunctionRegistry.build({"type": name, **options.get(name, {})}) for name in parts}
    torch.testing.assert_close(data.loss(loss), sum(w * data.loss(singles[name]) for name, w in parts.items()))
    expected = sum(w * data.gradient(singles[name]) for name, w in parts.items())
    torch.testing.assert_close(data.gradient(loss), expected)
    value, metrics = _run(loss)
    assert {
        name: metrics.pop(name).item() for name in list(metrics) if name.endswith(("_loss", "_weight"))
    } == pytest.approx(
        {
            "main_dpo_loss": data.loss(singles["sigmoid"]).item(),
            "main_dpo_weight": 1.0,
            "auxiliary_perplexity_loss": data.loss(singles["perplexity"]).item(),
            "auxiliary_perplexity_weight": 0.1,
            "auxiliary_consistency_loss": data.loss(singles["consistency"]).item(),
            "auxiliary_consistency_weight": 0.05,
            "auxiliary_safety_loss": data.loss(singles["safety"]).item(),
            "auxiliary_safety_weight": 1.0,
            "total_loss": value.item(),
        }
    )
    assert metrics.keys() == {"perplexity", "consistency_neighbours", "unsafe_fraction"}


def test_needs_what_its_parts_need() -> None:
    loss = _build({"consistency": {}, "safety": {"scorer": SCORER}})
    assert loss.requires == {"ref_logps", "sequence_hidden"}
    assert loss.columns == ("chosen_unsafe", "rejected_unsafe")
    assert loss.column_scorers["chosen_unsafe"] == ("chosen", SCORER)
    assert loss.batch_coupled and loss.minimum_batch == 2 and loss.family == "preference"


@pytest.mark.parametrize("names", [["perplexity", "safety"], {"perplexity": None, "safety": {}}], ids=str)
def test_takes_a_list_of_names_or_empty_options(names: Any) -> None:
    assert _build(names).names == ("main_dpo", "auxiliary_perplexity", "auxiliary_safety")


def test_a_name_is_free_where_the_type_is_given() -> None:
    loss = _build(
        {"fluent": {"type": "perplexity", "completions": "both"}, "ipo": {"beta": 0.5}}, auxiliary_weights={"fluent": 2}
    )
    assert loss.names == ("main_dpo", "auxiliary_fluent", "auxiliary_ipo")
    assert loss.weights == {"main_dpo": 1.0, "auxiliary_fluent": 2.0, "auxiliary_ipo": 1.0}
    assert [type(leaf).__name__ for leaf in loss.leaves()] == ["SigmoidLoss", "PerplexityLoss", "IPOLoss"]
    assert loss.leaves()[2].beta == 0.5


@pytest.mark.parametrize("base", ["ipo", {"type": "ipo", "beta": 0.3}, {"type": "composed", "components": []}], ids=str)
def test_the_main_loss_is_any_preference_loss(base: Any) -> None:
    if base == "ipo" or base["type"] == "ipo":
        main = next(_build({}, base=base).components())[1]
        assert main.name == "ipo" and main.beta == (0.1 if base == "ipo" else 0.3)
    else:
        assert _build({}, base=base | {"components": [{"type": "hinge"}]}).names == ("main_dpo",)


def test_left_out_hyperparameters_come_from_the_trainer() -> None:
    context = BuildContext(family="preference", defaults={"beta": 0.7}, defaults_from="DPOConfig")
    config = {"type": "multi_objective_dpo", "auxiliary_losses": {"consistency": {}, "safe_dpo": {"beta": 0.2}}}
    loss = LossFunctionRegistry.build(config, context=context)
    assert [leaf.beta for leaf in loss.leaves()] == [0.7, 0.7, 0.2]
    assert [leaf.origins["beta"] for leaf in loss.leaves()] == ["DPOConfig", "DPOConfig", "loss_function"]


def test_a_weight_may_follow_a_schedule() -> None:
    schedule = {"schedule": "linear", "start": 0.0, "end": 1.0, "total_steps": 4}
    loss = _build({"perplexity": {}}, auxiliary_weights={"perplexity": schedule})
    without, _ = _run(loss)
    loss.move_to_step(2)
    value, metrics = _run(loss)
    assert metrics["auxiliary_perplexity_weight"] == 0.5 and metrics["main_dpo_weight"] == 1.0
    torch.testing.assert_close(value, without + 0.5 * metrics["auxiliary_perplexity_loss"])


def test_balancing_reaches_the_composition() -> None:
    loss = _build({"perplexity": {}}, balancing="upgrad")
    assert loss.balancer is not None
    with pytest.raises(LossConfigError, match="no_such_balancer"):
        _build({"perplexity": {}}, balancing="no_such_balancer")


def test_takes_losses_that_are_made_already() -> None:
    loss = MultiObjectiveDPOLoss(
        base=SigmoidLoss(beta=0.3), auxiliary_losses={"fluent": PerplexityLoss(), "safety": {}}
    )
    assert loss.names == ("main_dpo", "auxiliary_fluent", "auxiliary_safety")
    assert LossFunctionRegistry.build(loss, family="preference") is loss
    with pytest.raises(LossConfigError, match="is a policy loss"):
        MultiObjectiveDPOLoss(base=GRPOLoss(), auxiliary_losses=[])


def test_two_scorers_of_one_column_are_refused() -> None:
    agreeing = {"safety": {"scorer": SCORER}, "again": {"type": "safety", "scorer": SCORER}}
    assert _build(agreeing).column_scorers["rejected_unsafe"] == ("rejected", SCORER)
    with pytest.raises(LossConfigError, match=r"'chosen_unsafe' has two scorers.*:scorer.*:other_scorer"):
        _build({"safety": {"scorer": SCORER}, "again": {"type": "safety", "scorer": OTHER}})


@pytest.mark.parametrize(
    ("auxiliary_losses", "options", "message"),
    [
        (["perplexity"], {"auxiliary_weights": {"perplexty": 1.0}}, "no auxiliary loss 'perplexty'.*mean 'perplexity'"),
        ([], {"auxiliary_weights": {"safety": 1.0}}, "no auxiliary loss 'safety'; there are none"),
        (["perplexity"], {"auxiliary_weights": {"main_dpo": 1.0}}, "no auxiliary loss 'main_dpo'"),
        (["perplexity"], {"auxiliary_weights": {"perplexity": "1"}}, "'auxiliary_perplexity', 'weight'.*found '1'"),
        (["perplexity"], {"auxiliary_weights": [1.0]}, "'auxiliary_weights'.*expected"),
        (["perplexity", "perplexity"], {}, "share the name 'perplexity'"),
        (["perplexty"], {}, "no loss named 'perplexty'.*mean 'perplexity'"),
        ([{"type": "perplexity"}], {}, "'auxiliary_losses': expected a list of names"),
        ("perplexity", {}, "'auxiliary_losses'.*expected"),
        ({"perplexity": 0.1}, {}, "'auxiliary_losses', 'perplexity': expected a dict of hyperparameters, found 0.1"),
        ({"perplexity": {"weight": 0.1}}, {}, "no hyperparameter 'weight'"),
        ({"grpo": {}}, {}, "'grpo' is a policy loss"),
        ({"a.b": {"type": "sft"}}, {}, "without dots"),
        ([], {"base": "grpo"}, "'grpo' is a policy loss"),
        ([], {"base": {"beta": 0.1}}, "'base': expected a loss's name or a dict with 'type'"),
        ([], {"base": 3}, "'base'.*expected"),
    ],
)
def test_refuses(auxiliary_losses: Any, options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        _build(auxiliary_losses, **options)
    with pytest.raises(LossConfigError, match=message):
        _build(auxiliary_losses, family=None, **options)


def test_needs_auxiliary_losses_to_be_named() -> None:
    with pytest.raises(LossConfigError, match="needs the hyperparameter 'auxiliary_losses'"):
        LossFunctionRegistry.build("multi_objective_dpo")


def test_is_no_loss_for_grpo() -> None:
    with pytest.raises(LossConfigError, match="'multi_objective_dpo' is a preference loss"):
        _build(["perplexity"], family="policy")
