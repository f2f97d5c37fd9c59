from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import Loss, LossConfigError, LossFunctionRegistry
from trl_custom_losses.losses.auxiliary import DiversityLoss, QualityLoss
from trl_custom_losses.losses.composite import MultiObjectiveGRPOLoss
from trl_custom_losses.losses.policy import DAPOLoss, GRPOLoss
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.registry import BuildContext
from trl_custom_losses.schedules import Linear
from trl_custom_losses.testing import Data, random_data


def _build(family: Any = "policy", defaults: dict[str, Any] | None = None, **config: Any) -> MultiObjectiveGRPOLoss:
    context = BuildContext(family=family, defaults=defaults or {}, defaults_from="Config")
    loss = LossFunctionRegistry.build({"type": "multi_objective_grpo", **config}, context=context)
    assert isinstance(loss, MultiObjectiveGRPOLoss)
    return loss


def _run(loss: Loss, data: Data) -> tuple[Tensor, dict[str, Any]]:
    batch, outputs = data.build(loss)
    raw, metrics = loss(batch, outputs)
    return reduce_loss(loss, raw, batch), dict(metrics)


def test_it_is_the_weighted_sum_of_its_parts() -> None:
    data = random_data("policy", size=6)
    total, metrics = _run(_build(base="dapo", diversity_weight=0.3, quality_weight=2), data)
    main, diversity, quality = (data.loss(loss) for loss in (DAPOLoss(), DiversityLoss(), QualityLoss()))
    torch.testing.assert_close(total, main + 0.3 * diversity + 2 * quality)
    named = {"main_grpo_loss": main, "diversity_loss": diversity, "quality_loss": quality, "total_loss": total}
    for name, value in named.items():
        torch.testing.assert_close(metrics[name], value.detach())
    weights = {"main_grpo_weight": 1.0, "diversity_weight": 0.3, "quality_weight": 2.0}
    assert {name: metrics[name].item() for name in weights} == pytest.approx(weights)


def test_defaults() -> None:
    loss = _build()
    assert loss.weights == {"main_grpo": 1.0, "diversity": 0.1, "quality": 0.1}
    assert [type(part) for _, part in loss.components()] == [GRPOLoss, DiversityLoss, QualityLoss]
    assert loss.columns == ("target",)
    assert loss.requires >= {"pooled_hidden", "old_per_token_logps"}
    assert loss.rollout_requires == {"pooled_hidden"}


def test_the_gradient_reaches_states_and_log_probabilities() -> None:
    data, loss = random_data("policy", size=6), _build()
    gradients = torch.autograd.grad(_run(loss, data)[0], [data.rows["logps"], data.rows["hidden"]])
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("weights", "names", "columns"),
    [
        ({"quality_weight": 0.0}, ("main_grpo", "diversity"), ()),
        ({"diversity_weight": 0}, ("main_grpo", "quality"), ("target",)),
        ({"diversity_weight": 0.0, "quality_weight": 0}, ("main_grpo",), ()),
    ],
)
def test_an_objective_of_weight_0_is_left_out(weights: dict, names: tuple, columns: tuple) -> None:
    loss = _build(**weights)
    assert loss.names == names and loss.columns == columns
    for name, weight in weights.items():
        assert getattr(loss, name) == weight
    _, metrics = _run(loss, random_data("policy", size=6))
    assert {name.removesuffix("_loss") for name in metrics if name.endswith("_loss")} == {*names, "total"}
    if names == ("main_grpo",):
        assert loss.rollout_requires == frozenset() and "pooled_hidden" not in loss.requires


_RISING = {"schedule": "linear", "start": 0.0, "end": 0.4, "total_steps": 4}


@pytest.mark.parametrize("weight", [_RISING, Linear(start=0.0, end=0.4, total_steps=4)], ids=["dict", "object"])
def test_a_weight_that_is_0_at_first_keeps_its_objective(weight: Any) -> None:
    data, loss = random_data("policy", size=6), _build(quality_weight=weight)
    parts = [data.loss(part) for part in (GRPOLoss(), DiversityLoss(), QualityLoss())]
    for step, expected in enumerate([0.0, 0.1, 0.2, 0.3, 0.4, 0.4]):
        loss.move_to_step(step)
        total, metrics = _run(loss, data)
        torch.testing.assert_close(total, parts[0] + 0.1 * parts[1] + expected * parts[2])
        assert metrics["quality_weight"].item() == pytest.approx(expected)
        assert loss.quality_weight == pytest.approx(expected)


def test_a_schedule_without_an_end_takes_the_runs() -> None:
    loss = _build(diversity_weight={"schedule": "cosine", "start": 0.2, "end": 0.0})
    loss.on_train_begin(10)
    loss.move_to_step(5)
    assert loss.diversity_weight == pytest.approx(0.1)
    assert "cosine(start=0.2, end=0.0)" in repr(loss)


def test_the_main_loss_takes_what_the_config_says() -> None:
    loss = _build(base={"type": "grpo", "epsilon_high": 0.5}, defaults={"epsilon": 0.07, "beta": 0.3})
    main = loss.losses[0]
    assert (main.epsilon, main.epsilon_high) == (0.07, 0.5)
    assert main.origins["epsilon"] == "Config"
    assert (main.name, loss.names[0]) == ("grpo", "main_grpo")


def test_the_main_loss_may_be_an_object_or_a_composition() -> None:
    data, weights = random_data("policy", size=6), {"diversity_weight": 0.0, "quality_weight": 0.0}
    given = GRPOLoss(epsilon=0.01)
    assert MultiObjectiveGRPOLoss(base=given, **weights).losses[0] is given
    components = [{"type": "grpo", "weight": 2.0}, {"type": "dapo"}]
    composed = _build(base={"type": "composed", "components": components}, **weights)
    total, metrics = _run(composed, data)
    torch.testing.assert_close(total, 2 * data.loss(GRPOLoss()) + data.loss(DAPOLoss()))
    torch.testing.assert_close(metrics["main_grpo_loss"], total.detach())


def test_what_the_main_loss_prepares_reaches_it_alone() -> None:
    data = random_data("policy", size=6)
    base = {"type": "dynamic_grpo", "similarity_threshold": 0.5}
    loss = _build(base=base)
    total, metrics = _run(loss, data)
    parts = [data.loss(LossFunctionRegistry.build(part, family="policy")) for part in (base, "diversity", "quality")]
    torch.testing.assert_close(total, parts[0] + 0.1 * parts[1] + 0.1 * parts[2])
    assert "num_dynamic_groups" in metrics


def test_objectives_are_balanced_where_asked() -> None:
    loss = _build(balancing={"type": "mgda", "gramian": "current"}).train()
    data = random_data("policy", size=6)
    total, metrics = _run(loss, data)
    weights = [metrics[f"{name}_weight"].item() for name in loss.names]
    assert weights != pytest.approx([1.0, 0.1, 0.1])
    parts = [metrics[f"{name}_loss"].item() for name in loss.names]
    assert total.item() == pytest.approx(sum(weight * part for weight, part in zip(weights, parts, strict=True)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base": "quality"}, "'base': expected a policy surrogate such as 'grpo' or 'dapo', found 'quality'"),
        ({"base": "sigmoid"}, "preference loss"),
        ({"base": 3}, "'base'"),
        ({"base": {"type": "grpo", "epsilon": -1.0}}, "'epsilon'"),
        ({"base": {"name": "grpo"}}, "'base': expected a loss's name or a dict with 'type'"),
        ({"diversity_weight": "0.1"}, "'diversity_weight'"),
        ({"diversity_weight": True}, "'diversity_weight': expected float, found True"),
        ({"quality_weight": False}, "'quality_weight': expected float, found False"),
        ({"quality_weight": float("nan")}, "finite"),
        ({"quality_weight": {"schedule": "lineal"}}, "there is no schedule 'lineal'"),
        ({"quality_weight": {"start": 1.0}}, "'quality_weight'"),
        ({"balancing": "up"}, "up"),
        ({"weights": {}}, "no hyperparameter 'weights'"),
    ],
)
def test_mistakes(config: dict, message: str) -> None:
    with pytest.raises(LossConfigError) as raised:
        _build(**config)
    assert message in str(raised.value)


def test_it_is_a_policy_loss() -> None:
    with pytest.raises(LossConfigError, match="policy loss"):
        _build(family="preference")
