from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trl_custom_losses.balancing.gradients.solvers import face_minimiser, nonnegative_qp, ridged, simplex_qp

from . import best_face, gramian_of, random_jacobians


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _random_problems(count: int, **options):
    generator = torch.Generator().manual_seed(1)
    for jacobian in random_jacobians(count, **options):
        gramian = gramian_of(jacobian)
        scale = gramian.diagonal().mean()
        yield gramian, scale * torch.randn(len(gramian), generator=generator, dtype=torch.float64)


def test_nonnegative_by_hand() -> None:
    identity = torch.eye(3, dtype=torch.float64)
    assert nonnegative_qp(identity, _vector(-2, 3, 0)).tolist() == [2, 0, 0]
    coupled = _vector(2, 1, 1, 2).reshape(2, 2)
    assert nonnegative_qp(coupled, _vector(-3, -3)).tolist() == pytest.approx([1, 1])
    assert nonnegative_qp(coupled, _vector(-4, -1)).tolist() == pytest.approx([2, 0])  # unconstrained: (7/3, -2/3)


def test_simplex_by_hand() -> None:
    assert simplex_qp(torch.diag(_vector(1, 2)), _vector(0, 0)).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert simplex_qp(torch.diag(_vector(1, 2)), _vector(0, -1)).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert simplex_qp(torch.diag(_vector(1, 2)), _vector(5, 0)).tolist() == [0, 1]
    assert simplex_qp(torch.ones(1, 1, dtype=torch.float64), _vector(7)).tolist() == [1]


def test_nonnegative_against_all_faces() -> None:
    for hessian, linear in _random_problems(100):
        found, expected = nonnegative_qp(hessian, linear), best_face(hessian, linear)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_simplex_against_all_faces() -> None:
    for hessian, linear in _random_problems(100):
        found, expected = simplex_qp(hessian, linear), best_face(hessian, linear, simplex=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dimensions", [1, 2, 30])
@pytest.mark.parametrize("imbalance", [0.0, 4.0])
def test_optimality_conditions(dimensions: int, imbalance: float) -> None:
    for gramian, linear in _random_problems(40, imbalance=imbalance, dimensions=dimensions):
        hessian = ridged(gramian)
        point = simplex_qp(hessian, linear)
        assert (point >= 0).all() and float(point.sum()) == pytest.approx(1)
        gradient = hessian @ point + linear
        assert gradient.min() >= gradient @ point - 1e-11  # no gain from moving weight anywhere

        linear = gramian @ linear  # bounded below
        point = nonnegative_qp(hessian, linear)
        gradient = hessian @ point + linear
        assert (point >= 0).all() and gradient.min() >= -1e-11 and abs(float(gradient @ point)) <= 1e-10


def test_many_equal_gradients_end() -> None:
    for size in range(2, 11):
        signs = torch.tensor([1.0, -1.0] * size, dtype=torch.float64)[:size]
        gramian = torch.outer(signs, signs) / size
        point = simplex_qp(ridged(gramian), torch.zeros_like(signs))
        assert abs(float(point @ signs)) < 1e-6
        for row in gramian:
            point = nonnegative_qp(ridged(gramian), row)
            assert (gramian @ point + row).abs().max() < 1e-6


def test_an_indefinite_hessian_ends() -> None:
    """Not what it is made for; it must not hang all the same."""
    generator = torch.Generator().manual_seed(2)
    for size in (2, 4, 8):
        hessian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        for row in hessian:
            nonnegative_qp(hessian + hessian.T, row)
            simplex_qp(hessian + hessian.T, row)


def test_the_ridge_is_relative_to_each_gradient() -> None:
    gramian = torch.diag(_vector(1, 1e-12, 0))
    added = (ridged(gramian) - gramian).diagonal()
    assert 0 < added[0] < 1e-8
    assert 0 < added[1] < 1e-20
    assert 0 < added[2] < 1e-29


def test_face_minimiser_keeps_the_others_at_zero() -> None:
    free = torch.tensor([True, False, True])
    hessian, linear = torch.diag(_vector(1, 2, 4)), _vector(-1, -1, -1)
    assert face_minimiser(hessian, linear, free, None).tolist() == [1, 0, 0.25]
    assert face_minimiser(hessian, 0 * linear, free, 1.0).tolist() == pytest.approx([0.8, 0, 0.2])
