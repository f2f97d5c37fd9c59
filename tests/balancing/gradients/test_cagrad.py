from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trl_custom_losses.balancing.gradients import MGDA, CAGrad
from trl_custom_losses.errors import LossConfigError

from . import OPPOSED, gramian_of, random_jacobians

_RADII = [0.1, 0.5, 0.9, 2.0]


def _dual(gramian: Tensor, c: float, shares: Tensor) -> Tensor:
    """The published objective, an upper bound of min_i <g_i, d> over the ball for any point of the simplex."""
    mean = torch.full_like(shares, 1 / len(shares))
    return shares @ gramian @ mean + c * (mean @ gramian @ mean).sqrt() * (shares @ gramian @ shares).sqrt()


def _distance(gramian: Tensor, weights: Tensor) -> float:
    """|d - g_0| / |g_0|."""
    change = (weights - 1) / len(weights)
    mean = torch.full_like(weights, 1 / len(weights))
    return float((change @ gramian @ change).clamp(min=0).sqrt() / (mean @ gramian @ mean).sqrt())


def test_documented_example() -> None:
    """TorchJD's, which has the mean of the gradients where the sum stands here."""
    weights = CAGrad(c=0.5)(OPPOSED @ OPPOSED.T, 0) / 2
    assert weights.tolist() == pytest.approx([0.5 + 0.5 / 6**0.5, 0.5])  # |g_0| = sqrt 3, |g_1| = sqrt 18, a = (1, 0)
    assert (OPPOSED.T @ weights).tolist() == pytest.approx([0.1835, 1.2041, 1.2041], abs=5e-5)


def test_interior_point_by_hand() -> None:
    """c = 1, where the ball touches 0: a = (0.7, 0.3), g_a = (-1, 1, 1) is as long as g_0 = (1, 1, 1)."""
    assert (CAGrad(c=1.0)(OPPOSED @ OPPOSED.T, 0) / 2).tolist() == pytest.approx([1.2, 0.8])


def test_two_objectives_against_a_grid() -> None:
    shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    points = torch.stack([shares, 1 - shares])
    for jacobian in [jacobian[:2] for jacobian in random_jacobians(25)]:
        gramian = gramian_of(jacobian)
        for c in _RADII:
            found = CAGrad(c=c)(gramian, 0) - 1
            mean = torch.full((2,), 0.5, dtype=torch.float64)
            lengths = (points * (gramian @ points)).sum(0).sqrt()
            values = points.T @ gramian @ mean + c * (mean @ gramian @ mean).sqrt() * lengths
            assert float(found[0] / found.sum()) == pytest.approx(float(shares[values.argmin()]), abs=2e-5)


@pytest.mark.parametrize("c", _RADII)
@pytest.mark.parametrize("imbalance", [0.0, 2.0])
def test_primal_and_dual_agree(c: float, imbalance: float) -> None:
    """The worst objective's gain equals the dual's value, an upper bound of it: both are optimal."""
    for jacobian in random_jacobians(40, imbalance=imbalance):
        gramian = gramian_of(jacobian)
        weights = CAGrad(c=c)(gramian, 0)
        assert _distance(gramian, weights) == pytest.approx(c)
        shares = (weights - 1) / (weights - 1).sum()
        assert (shares >= 0).all()
        gain = (gramian @ weights).min() / len(gramian)
        assert float(gain) == pytest.approx(float(_dual(gramian, c, shares)), abs=2e-8)


@pytest.mark.parametrize("c", _RADII)
def test_against_torchjd(c: float) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    for module in ("numpy", "cvxpy", "clarabel"):
        pytest.importorskip(module)
    oracle = torchjd.CAGradWeighting(c=c)
    for jacobian in random_jacobians(25):
        gramian = jacobian @ jacobian.T
        # Its solver stops at 1e-8 of the objective, that is at about 1e-4 of the weights.
        torch.testing.assert_close(CAGrad(c=c)(gramian, 0), len(gramian) * oracle(gramian), rtol=1e-3, atol=1e-3)


def test_no_radius_is_the_sum_and_a_large_one_mgda() -> None:
    for jacobian in random_jacobians(30):
        gramian = gramian_of(jacobian)
        assert CAGrad(c=0.0)(gramian, 0).tolist() == [1.0] * len(gramian)
        far, shortest = CAGrad(c=1e6)(gramian, 0), MGDA()(gramian, 0)
        torch.testing.assert_close(far / far.sum(), shortest / shortest.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("c", [1e-300, 1e-12, 1e-4, 1e20, 1e200])
def test_extreme_radii_end(c: float) -> None:
    for jacobian in random_jacobians(5, imbalance=2):
        assert torch.isfinite(CAGrad(c=c)(jacobian @ jacobian.T, 0)).all()


def test_equal_gradients_are_only_lengthened() -> None:
    for size in range(1, 5):
        weights = CAGrad(c=0.5)(torch.ones(size, size), 0)
        assert weights.tolist() == pytest.approx([1.5] * size)


def test_opposite_gradients_leave_no_mean_to_stay_near() -> None:
    assert CAGrad()(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 0).tolist() == [1, 1]


def test_a_zero_gradient_does_not_stop_the_others() -> None:
    """The published formula is 0 / 0 there: the nearest direction without conflict."""
    assert CAGrad()(torch.diag(torch.tensor([1.0, 0.0])), 0).tolist() == pytest.approx([1, 1])
    jacobian = torch.cat([OPPOSED, torch.zeros(1, 3, dtype=torch.float64)])
    gramian = gramian_of(jacobian)
    direction = gramian @ CAGrad(c=0.9)(gramian, 0)
    assert direction.min() > -1e-8
    assert direction[0] == pytest.approx(0, abs=1e-8)  # the plain sum has -4 here: on the edge of the cone


@pytest.mark.parametrize("c", _RADII)
def test_stationary_points_stay_in_the_ball_and_finite(c: float) -> None:
    for jacobian in random_jacobians(40, dimensions=1):
        gramian = gramian_of(jacobian)
        weights = CAGrad(c=c)(gramian, 0)
        assert torch.isfinite(weights).all() and (weights >= 1 - 1e-12).all() and weights.max() < 1e4
        assert _distance(gramian, weights) <= c * (1 + 1e-6)


def test_a_stationary_point_with_a_large_radius_has_no_direction() -> None:
    jacobian = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    weights = CAGrad(c=2.0)(jacobian @ jacobian.T, 0)
    assert weights.tolist() == pytest.approx([3, 1])
    assert CAGrad(c=0.5)(jacobian @ jacobian.T, 0).tolist() == pytest.approx([2, 1])  # 0 is outside the ball


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_radius(value: float) -> None:
    with pytest.raises(LossConfigError, match="'c'"):
        CAGrad(c=value)
