from __future__ import annotations

import pytest
import torch

from trl_custom_losses.balancing.gradients import UPGrad
from trl_custom_losses.errors import LossConfigError

from . import OPPOSED, best_face, gramian_of, random_jacobians


def test_documented_example() -> None:
    """TorchJD's, which is the mean of the two projections, with its ridge."""
    weights = UPGrad(reg_eps=1e-4)(OPPOSED @ OPPOSED.T, 0)
    assert (weights / 2).tolist() == pytest.approx([1.11092105, 0.78943103], abs=1e-8)
    assert (OPPOSED.T @ weights / 2).tolist() == pytest.approx([0.2929, 1.9004, 1.9004], abs=5e-5)


def test_two_objectives_by_hand() -> None:
    """Each gradient loses its component along the other: 22/18 of the first goes into the second and 22/38 back."""
    assert UPGrad(reg_eps=1e-14)(OPPOSED @ OPPOSED.T, 0).tolist() == pytest.approx([1 + 22 / 18, 1 + 22 / 38])


def test_three_objectives_by_hand() -> None:
    """Only the first two conflict: each projection is (e1 + e2) / 2; the third is orthogonal."""
    jacobian = torch.tensor([[1.0, -0.5, 0], [-0.5, 1.0, 0], [0, 0, 2.0]], dtype=torch.float64)
    direction = jacobian.T @ UPGrad(reg_eps=1e-14)(jacobian @ jacobian.T, 0)
    first = torch.tensor([1.0, -0.5]) - (-1.0 / 1.25) * torch.tensor([-0.5, 1.0])
    assert direction.tolist() == pytest.approx([float(first.sum()), float(first.sum()), 2.0])


def test_projections_against_all_faces() -> None:
    for jacobian in random_jacobians(40):
        gramian = gramian_of(jacobian)
        regular = gramian + 1e-6 * torch.eye(len(gramian), dtype=torch.float64)
        expected = 1 + sum(best_face(regular, row) for row in regular)
        torch.testing.assert_close(UPGrad(reg_eps=1e-6)(gramian, 0), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("reg_eps", [1e-4, 1e-8])
@pytest.mark.parametrize("imbalance", [0.0, 2.0])
def test_against_torchjd(reg_eps: float, imbalance: float) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    for module in ("numpy", "qpsolvers", "quadprog"):
        pytest.importorskip(module)
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=reg_eps)
    oracle = torchjd.UPGradWeighting(projector=projector)
    for jacobian in random_jacobians(80, imbalance=imbalance):
        gramian = jacobian @ jacobian.T
        expected = len(gramian) * oracle(gramian)
        torch.testing.assert_close(UPGrad(reg_eps=reg_eps)(gramian, 0), expected, rtol=1e-8, atol=1e-8)


def test_no_conflict_leaves_the_sum_exactly() -> None:
    for jacobian in random_jacobians(100, imbalance=6):
        gramian = jacobian.abs() @ jacobian.abs().T
        assert UPGrad()(gramian, 0).tolist() == [1.0] * len(gramian)
    assert UPGrad()(torch.diag(torch.tensor([1.0, 0.0, 1e-9])), 0).tolist() == [1.0] * 3


@pytest.mark.parametrize("dimensions", [1, 2, None])
def test_no_loss_rises(dimensions: int | None) -> None:
    for jacobian in random_jacobians(100, dimensions=dimensions):
        gramian = gramian_of(jacobian)
        weights = UPGrad(reg_eps=1e-8)(gramian, 0)
        assert (weights >= 1).all()
        assert (gramian @ weights).min() >= -2e-8 * weights.max()


def test_the_ridge_caps_the_weight_of_a_short_gradient() -> None:
    for length in torch.logspace(-9, 0, 40).tolist():
        jacobian = torch.tensor([[1.0], [-length]], dtype=torch.float64)
        assert UPGrad(reg_eps=1e-6)(jacobian @ jacobian.T, 0)[1] <= 1 + 0.5e3


def _train(aggregator: UPGrad | None) -> torch.Tensor:
    """Changes of two losses along 200 steps: one is ten times as steep in x, both want y = 0."""
    wanted = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    steepness = torch.tensor([[1.0, 1.0], [10.0, 1.0]], dtype=torch.float64)
    parameters, losses = torch.tensor([0.0, 1.5], dtype=torch.float64), []
    for step in range(200):
        offsets = parameters - wanted
        losses.append((steepness * offsets.square()).sum(1) / 2)
        jacobian = steepness * offsets
        weights = torch.ones(2).double() if aggregator is None else aggregator(jacobian @ jacobian.T, step)
        parameters = parameters - 0.01 * jacobian.T @ weights
    return torch.stack(losses).diff(dim=0)


def test_both_losses_fall_where_the_sum_raises_one() -> None:
    plain, projected = _train(None), _train(UPGrad(reg_eps=1e-8))
    assert plain[0, 0] > 0 and plain[:, 0].sum() > 0  # raised at once and for good
    assert (projected <= 1e-8).all()
    assert (projected.sum(0) < -0.3).all()


@pytest.mark.parametrize("value", [0.0, -1e-4, 1.0, float("nan")])
def test_bad_ridge(value: float) -> None:
    with pytest.raises(LossConfigError, match="reg_eps"):
        UPGrad(reg_eps=value)
