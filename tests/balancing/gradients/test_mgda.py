from __future__ import annotations

import pytest
import torch

from trl_custom_losses.balancing.gradients import MGDA

from . import OPPOSED, best_face, gramian_of, random_jacobians


def test_two_objectives_by_hand() -> None:
    """Share of the first: (38 + 22) / (18 + 38 + 44) = 0.6, times two."""
    weights = MGDA()(OPPOSED @ OPPOSED.T, 0)
    assert weights.tolist() == pytest.approx([1.2, 0.8], abs=1e-8)
    assert (OPPOSED.T @ weights).tolist() == pytest.approx([0, 2, 2], abs=1e-8)


def test_orthogonal_gradients_are_weighted_by_inverse_squares() -> None:
    weights = MGDA()(torch.diag(torch.tensor([1.0, 4.0, 0.25])), 0)
    assert weights.tolist() == pytest.approx([3 * 1 / 5.25, 3 * 0.25 / 5.25, 3 * 4 / 5.25], abs=1e-8)


def test_a_short_gradient_on_the_way_gets_all() -> None:
    jacobian = torch.tensor([[1.0, 0.1], [0.1, 0.0], [1.0, -0.2]], dtype=torch.float64)
    assert MGDA()(jacobian @ jacobian.T, 0).tolist() == [0, 3, 0]


def test_very_short_gradients_keep_their_proportions() -> None:
    weights = MGDA()(torch.diag(torch.tensor([1.0, 1e-14, 2e-14], dtype=torch.float64)), 0)
    assert weights.tolist() == pytest.approx([0, 2, 1], abs=1e-6)


def test_against_all_faces() -> None:
    for jacobian in random_jacobians(100):
        gramian = gramian_of(jacobian)
        expected = len(gramian) * best_face(gramian, torch.zeros(len(gramian), dtype=torch.float64), simplex=True)
        torch.testing.assert_close(MGDA()(gramian, 0), expected, rtol=0, atol=1e-6)


def test_two_objectives_against_a_grid() -> None:
    shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    points = torch.stack([shares, 1 - shares])
    for jacobian in [jacobian[:2] for jacobian in random_jacobians(40)]:
        gramian = gramian_of(jacobian)
        lengths = (points * (gramian @ points)).sum(0)
        assert MGDA()(gramian, 0)[0] / 2 == pytest.approx(float(shares[lengths.argmin()]), abs=1e-5)


@pytest.mark.parametrize("imbalance", [0.0, 2.0])
def test_not_longer_than_torchjd(imbalance: float) -> None:
    """Its Frank-Wolfe steps approach the exact solution from above."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    oracle = torchjd.MGDAWeighting(epsilon=1e-5, max_iters=200)
    for index, jacobian in enumerate(random_jacobians(50, imbalance=imbalance)):
        gramian = gramian_of(jacobian)
        found, expected = MGDA()(gramian, 0) / len(gramian), oracle(gramian)
        assert found @ gramian @ found <= expected @ gramian @ expected + 1e-12
        assert expected @ gramian @ expected - found @ gramian @ found < 1e-2
        if index % 5 == 0:  # two objectives: solved exactly there too
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dimensions", [1, 2, None])
@pytest.mark.parametrize("imbalance", [0.0, 3.0])
def test_every_loss_falls_by_the_squared_length(dimensions: int | None, imbalance: float) -> None:
    for jacobian in random_jacobians(100, dimensions=dimensions, imbalance=imbalance):
        gramian = gramian_of(jacobian)
        shares = MGDA()(gramian, 0) / len(gramian)
        assert (shares >= 0).all() and float(shares.sum()) == pytest.approx(1)
        assert (gramian @ shares).min() >= shares @ gramian @ shares - 1e-8


def test_no_direction_at_a_stationary_point() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    weights = MGDA()(jacobian @ jacobian.T, 0)
    assert weights.tolist() == pytest.approx([1.2, 0.6, 1.2], abs=1e-7)
    assert (jacobian.T @ weights).abs().max() < 1e-7


def test_a_zero_gradient_stops_the_others() -> None:
    assert MGDA()(torch.diag(torch.tensor([1.0, 0.0, 3.0])), 0).tolist() == pytest.approx([0, 3, 0])
    assert MGDA()(torch.diag(torch.tensor([1.0, 0.0, 0.0])), 0).tolist() == pytest.approx([0, 1.5, 1.5])
