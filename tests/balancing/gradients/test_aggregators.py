"""What holds for all gradient aggregators."""

from __future__ import annotations

import pytest
import torch

from trl_custom_losses.balancing.gradients import AGGREGATORS, Aggregator, UPGrad

from . import OPPOSED, gramian_of, random_jacobians


@pytest.fixture(params=AGGREGATORS)
def aggregator(request: pytest.FixtureRequest) -> Aggregator:
    return AGGREGATORS[request.param]()


def test_names() -> None:
    assert list(AGGREGATORS) == ["upgrad", "mgda", "pcgrad", "cagrad"]
    assert all(issubclass(cls, Aggregator) and cls.__name__.lower() == name for name, cls in AGGREGATORS.items())


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e-8, 1e8, 1e20, 1e300])
def test_weights_do_not_depend_on_the_scale(aggregator: Aggregator, scale: float) -> None:
    for jacobian in random_jacobians(5):
        gramian = gramian_of(jacobian)
        torch.testing.assert_close(aggregator(scale * gramian, 0), aggregator(gramian, 0), rtol=1e-7, atol=1e-9)


def test_a_trace_that_overflows(aggregator: Aggregator) -> None:
    largest = torch.finfo(torch.float64).max
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(aggregator(largest * gramian, 0), aggregator(gramian, 0))


@pytest.mark.parametrize("length", [1.0, 1e-12])
def test_tiny_gradients_lose_their_conflict_too(aggregator: Aggregator, length: float) -> None:
    jacobian = length * OPPOSED
    overlaps = jacobian @ (jacobian.T @ aggregator(jacobian @ jacobian.T, 0)) / length**2
    assert overlaps.min() > -1e-6
    assert (OPPOSED @ OPPOSED.sum(0)).min() == -4


def test_weights_follow_a_permutation(aggregator: Aggregator) -> None:
    if type(aggregator).__name__ == "PCGrad":
        pytest.skip("its order is random")
    for jacobian in random_jacobians(40):
        gramian = gramian_of(jacobian)
        order = torch.randperm(len(gramian), generator=torch.Generator().manual_seed(len(gramian)))
        permuted = aggregator(gramian[order][:, order], 0)
        torch.testing.assert_close(permuted, aggregator(gramian, 0)[order], rtol=1e-6, atol=1e-7)


def test_equal_objectives_share_their_weight(aggregator: Aggregator) -> None:
    jacobian = OPPOSED[[0, 0, 1]]
    for step in range(5):
        weights = aggregator(jacobian @ jacobian.T, step)
        assert float(weights[0] - weights[1]) == pytest.approx(0, abs=1e-4) or type(aggregator).__name__ == "PCGrad"


@pytest.mark.parametrize(
    "gramian",
    [
        torch.zeros(3, 3),
        torch.full((3, 3), torch.nan),
        torch.eye(3).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan)),
        torch.diag(torch.tensor([1.0, torch.inf, 1.0])),
        -torch.eye(3),
    ],
)
def test_what_is_no_gramian_leaves_the_sum(aggregator: Aggregator, gramian: torch.Tensor) -> None:
    assert aggregator(gramian, 0).tolist() == [1, 1, 1]


def test_one_objective(aggregator: Aggregator) -> None:
    expected = 1.5 if type(aggregator).__name__ == "CAGrad" else 1.0
    assert aggregator(torch.tensor([[4.0]]), 0).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_the_shape_is_checked(aggregator: Aggregator, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square"):
        aggregator(torch.ones(shape), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_is_detached_double_and_the_gramian_untouched(aggregator: Aggregator, dtype: torch.dtype) -> None:
    gramian = gramian_of(OPPOSED).to(dtype).requires_grad_()
    before = gramian.detach().clone()
    weights = aggregator(gramian, 0)
    assert weights.dtype is torch.float64 and not weights.requires_grad
    assert torch.equal(gramian, before)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_singular_gramians_with_rounding(aggregator: Aggregator, dimensions: int) -> None:
    """Products in single precision have negative eigenvalues; the direction hardly notices."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(aggregator, UPGrad):
        aggregator = UPGrad(reg_eps=1e-8)
    for jacobian in random_jacobians(60, dimensions=dimensions, imbalance=1):
        lengths = jacobian.norm(dim=1)
        noise = 1e-7 * torch.randn(len(lengths), len(lengths), generator=generator, dtype=torch.float64)
        exact = jacobian @ jacobian.T
        weights = aggregator(exact + (noise + noise.T) * torch.outer(lengths, lengths), 0)
        assert torch.isfinite(weights).all() and (weights >= 0).all() and weights.max() < 1e4
        if type(aggregator).__name__ in ("UPGrad", "MGDA"):
            direction = jacobian.T @ weights
            assert (jacobian @ direction / lengths).min() >= -1e-3 * lengths.max()


def test_indefinite_gramians_are_repaired() -> None:
    class Recorder(Aggregator):
        def weights(self, gramian: torch.Tensor, step: int) -> torch.Tensor:
            self.seen = gramian
            return gramian[0]

    recorder = Recorder()
    recorder(torch.tensor([[4.0, -2.1, 0.0], [-1.9, 1.0 - 1e-3, 0.0], [0.0, 0.0, 0.0]]), 0)
    assert torch.equal(recorder.seen, recorder.seen.T)
    assert torch.linalg.eigvalsh(recorder.seen)[0] >= -1e-15
    assert recorder.seen[2].tolist() == [0, 0, 0]
    assert recorder.seen.trace() == pytest.approx(1, abs=1e-3)
