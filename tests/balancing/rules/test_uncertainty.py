"""Learned log variances: values, gradients, and where they come to rest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError
from trl_custom_losses.balancing.rules import RULES, UncertaintyWeights, WeightRule

from . import names


def _weights(*initial: float, **options) -> UncertaintyWeights:
    return UncertaintyWeights(names=names(len(initial)), initial_weights=initial, **options)


def _gradients(rule: UncertaintyWeights, values: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    losses = torch.tensor(values, dtype=rule.log_variances.dtype, requires_grad=True)
    total = rule(losses)
    on_losses, on_log_variances = torch.autograd.grad(total, [losses, rule.log_variances])
    return total.detach(), on_losses, on_log_variances


def test_by_hand() -> None:
    rule = _weights(2.0, 0.5).double()
    total, on_losses, on_s = _gradients(rule, [3.0, 1.0])
    assert total.item() == pytest.approx(2 * 3 + 0.5 * 1 - math.log(2) - math.log(0.5))
    assert on_losses.tolist() == pytest.approx([2.0, 0.5])
    assert on_s.tolist() == pytest.approx([1 - 2 * 3, 1 - 0.5 * 1])


def test_starts_from_the_initial_weights() -> None:
    rule = _weights(2.0, 0.5, 1.0)
    assert rule.log_variances.dtype == torch.float32
    assert rule.log_variances[2].item() == 0.0
    assert rule.weights == pytest.approx([2.0, 0.5, 1.0], rel=1e-6)
    assert rule.tensor_weights().tolist() == rule.weights
    assert not rule.tensor_weights().requires_grad


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_gradcheck(share: float) -> None:
    rule = _weights(2.0, 0.5, 0.1).double()

    def total(losses: Tensor, log_variances: Tensor) -> Tensor:
        return torch.func.functional_call(rule, {"log_variances": log_variances}, (losses, share))

    losses = torch.tensor([0.3, 4.0, 20.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (losses, rule.log_variances.detach().requires_grad_()))


@pytest.mark.parametrize("loss", [0.05, 1.0, 30.0])
def test_the_best_log_variance_is_the_log_of_the_loss(loss: float) -> None:
    rule = _weights(1.0).double()
    with torch.no_grad():
        rule.log_variances.fill_(math.log(loss))
    _, _, on_s = _gradients(rule, [loss])
    assert on_s.item() == pytest.approx(0.0, abs=1e-12)
    best = rule(torch.tensor([loss], dtype=torch.float64)).item()
    assert best == pytest.approx(1 + math.log(loss))
    for distance in (-0.5, -0.01, 0.01, 0.5):
        with torch.no_grad():
            rule.log_variances.fill_(math.log(loss) + distance)
        assert rule(torch.tensor([loss], dtype=torch.float64)).item() > best


def _trained(rule: UncertaintyWeights, values: list[float], steps: int = 100) -> list[float]:
    for _ in range(steps):
        _, _, on_s = _gradients(rule, values)
        with torch.no_grad():
            rule.log_variances -= 0.2 * on_s
        rule.hold()
    return rule.weights


def test_training_brings_objectives_to_the_same_magnitude() -> None:
    assert _trained(_weights(1.0, 1.0), [0.4, 2.5]) == pytest.approx([2.5, 0.4], rel=1e-2)


@pytest.mark.parametrize("value", [0.0, -0.5, 1e-7])
def test_losses_of_about_zero_and_below_end_at_the_bound(value: float) -> None:
    rule = _weights(2.0, loss_floor=0.1).double()
    total, on_losses, on_s = _gradients(rule, [value])
    assert total.item() == pytest.approx(2 * value - math.log(2))
    assert on_losses.item() == pytest.approx(2.0)
    assert on_s.item() == pytest.approx(1 - 2 * value)
    assert _trained(_weights(1.0, loss_floor=0.1), [value]) == pytest.approx([10.0], rel=1e-5)
    assert _trained(_weights(1.0), [value]) == pytest.approx([1000.0], rel=1e-5)


def test_what_is_held_recovers_at_once() -> None:
    rule = _weights(1.0, loss_floor=0.1)
    held = _trained(rule, [-5.0])[0]
    _, _, on_s = _gradients(rule, [3.0])
    assert held == pytest.approx(10.0) and on_s.item() < 0  # the next positive loss lowers the weight again


def test_micro_batches_sum_to_the_step() -> None:
    """Contributions of four micro-batches, each a share of 1/4, against the step's losses at once."""
    contributions = torch.tensor([[0.3, 1.0], [-0.6, 2.0], [0.4, -0.5], [0.2, 1.5]], dtype=torch.float64)
    rule = _weights(2.0, 0.5).double()
    parts = [rule(row, share) for row, share in zip(contributions, [0.25, 0.25, torch.tensor(0.25), 0.25], strict=True)]
    whole = rule(contributions.sum(0))
    torch.testing.assert_close(sum(parts), whole)
    of_parts, of_whole = [torch.autograd.grad(t, rule.log_variances)[0] for t in (sum(parts), whole)]
    torch.testing.assert_close(of_parts, of_whole)


def test_moves_and_is_saved_with_the_model() -> None:
    rule = _weights(2.0, 0.5)
    assert not isinstance(rule, WeightRule)
    assert [name for name, _ in rule.named_parameters()] == ["log_variances"]
    assert rule.learning_rate == 1e-2  # of the optimizer group that the trainer makes
    other = _weights(1.0, 1.0)
    other.load_state_dict(rule.state_dict())
    assert other.weights == rule.weights
    assert rule.to("meta").log_variances.device.type == "meta"


def test_the_total_is_computed_on_the_device() -> None:
    """Nothing on the way asks for a value, which a meta tensor has not."""
    rule = _weights(2.0, 0.5).to("meta")
    total = rule(torch.ones(2, device="meta"))
    assert total.shape == ()
    assert rule.tensor_weights().shape == (2,)


def test_half_precision_losses() -> None:
    total = _weights(2.0, 0.5)(torch.ones(2, dtype=torch.bfloat16))
    assert total.dtype == torch.float32


def test_registered() -> None:
    assert list(RULES) == ["trend", "dwa", "softadapt", "relobralo", "constraint", "uncertainty"]
    assert [issubclass(rule, WeightRule) for rule in RULES.values()] == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_weights": [0.0]}, "weight of 'a'.* > 0"),
        ({"initial_weights": [-1.0]}, "weight of 'a'.* > 0"),
        ({"initial_weights": [1.0, 1.0]}, "one initial weight for each"),
        ({"names": ["a", "a"], "initial_weights": [1.0, 1.0]}, "share the name 'a'"),
        ({"learning_rate": 0.0}, "learning_rate.* > 0"),
        ({"loss_floor": 0.0}, "loss_floor.* > 0"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        UncertaintyWeights(**{"names": ["a"], "initial_weights": [1.0]} | options)
