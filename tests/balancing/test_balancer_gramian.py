"""The Gramian that gradient balancing observes, against plain autograd and however a batch is split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trl_custom_losses import Denominators, ModelOutputs
from trl_custom_losses.balancing.gramian import gramian_of, step_gramian
from trl_custom_losses.testing import Data, random_data
from trl_custom_losses.types import gradients_of

from .compositions import balanced, explicit_gramian, take_step

pytestmark = pytest.mark.usefixtures("registered")


# The Gramian


def test_gramian_is_that_of_the_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((2, 3), (4,)))
    losses = [(x**2).sum(), x.sum() * y.sum(), (y**3).sum(), torch.ones((), dtype=torch.float64)]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(losses[3], x)  # it does not depend on the anchors at all
    found = gramian_of([gradients_of(loss, [x, y]) for loss in losses])
    torch.testing.assert_close(found[:3, :3], explicit_gramian(losses[:3], [x, y]))
    assert found[0, 2] == 0 and not found[3].any() and not found[:, 3].any()
    assert not found.requires_grad and x.grad is None
    sum(losses).backward()  # the graph is still there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_accumulated_in_float32_or_better(dtype: torch.dtype) -> None:
    """Half precision would overflow, and round what many small products add up to."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 500_000, generator=generator).to(dtype) for _ in range(2)]
    found = gramian_of([[gradient] for gradient in gradients])
    flat = torch.stack([gradient.flatten() for gradient in gradients]).double()
    torch.testing.assert_close(found.double(), flat @ flat.T, rtol=1e-5, atol=0.01)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found, found.T) and found[0, 0] > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gramian_of([[gradient] for gradient in gradients]), found)


def test_products_copy_no_gradient() -> None:
    largest = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **kwargs or {})
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
                largest.append(result.numel())
            return result

    for dtype, bound in ((torch.float32, 9), (torch.bfloat16, 2**20)):
        gradients = [torch.ones(3, 2**20, dtype=dtype) for _ in range(3)]
        given = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        with Watching():
            gramian_of([[gradient] for gradient in gradients])
        assert 1 <= max(largest) <= bound
        largest.clear()


def test_a_tensor_that_a_loss_does_not_reach_costs_nothing() -> None:
    """Logits of a second pass, which few losses read, are as large as the first ones."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 9, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    outputs = ModelOutputs(per_token_logps=x[:, :4], mask=torch.ones(2, 4), logits=x, second_logits=y)
    losses = [(x**2).sum(), (x**3).sum(), (x * y).sum(), torch.ones(())]
    assert [[part is None for part in outputs.slopes(loss)] for loss in losses] == [[0, 1], [0, 1], [0, 0], [1, 1]]
    batch, _ = random_data("preference").build(balanced("upgrad", "sigmoid", "sft"))
    made = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(function)
            return function(*args, **kwargs or {})

    with Watching():
        found = step_gramian(losses, batch, outputs)
    assert torch.ops.aten.zeros_like.default not in made
    torch.testing.assert_close(found[:3, :3], explicit_gramian(losses[:3], [x, y]))
    assert not found[3].any() and not found[:, 3].any()
    assert not step_gramian([torch.ones(()), torch.ones(())], batch, outputs).any()


@pytest.mark.parametrize("fields", [("per_token_logps",), ("per_token_logps", "entropies"), ("pooled_hidden",)])
def test_observes_the_gramian_with_respect_to_all_that_is_read(fields: tuple[str, ...]) -> None:
    components = [{"type": "reading", "field": field, "seed": i} for i, field in enumerate(fields * 2)]
    loss = balanced("upgrad", "sigmoid", "sft", *components)
    data = random_data("preference")
    data.rows["entropies"].requires_grad_()
    batch, outputs = data.build(loss)
    # With respect to what the model returned: at masked positions, which these losses read, nothing reaches it.
    rows = {"per_token_logps": "logps", "entropies": "entropies", "pooled_hidden": "hidden"}
    anchors = [data.rows[rows[name]] for name in dict.fromkeys(("per_token_logps", *fields))]
    assert (data.rows["mask"] == 0).any()
    expected = explicit_gramian(list(loss.contributions(batch, outputs)[0].values()), anchors)
    torch.testing.assert_close(take_step(loss, 0, [(batch, outputs)]), expected)
    assert (expected.abs() > 1e-6).sum() > len(components) + 2, "some are not orthogonal"


def test_logits_stand_for_what_is_computed_from_them() -> None:
    """Log-probabilities would be counted twice beside them."""
    loss = balanced("upgrad", "sigmoid", {"type": "reading", "field": "logits"}, {"type": "reading", "seed": 1})
    batch, outputs = random_data("preference", lengths=[5] * 8).build(loss)
    logits = outputs.logits.detach().requires_grad_()
    chosen = logits.log_softmax(-1)[..., 0]
    outputs = ModelOutputs(per_token_logps=chosen, mask=outputs.mask, logits=logits, ref_sums=outputs.ref_sums)
    assert outputs.anchors() == [logits]
    expected = explicit_gramian(list(loss.contributions(batch, outputs)[0].values()), [logits])
    torch.testing.assert_close(take_step(loss, 0, [(batch, outputs)]), expected)
    assert (expected[0, 1:].abs() > 1e-8).all()


@pytest.mark.parametrize("names", [("sigmoid", "sft", "sigmoid_norm"), ("everywhere", "sft"), ("grpo", "luspo")])
def test_padding_changes_nothing(names: tuple[str, ...]) -> None:
    found = []
    for padding in (0, 5):
        loss = balanced("upgrad", *names)
        data = random_data(loss.family)
        data = data.padded(padding, fill=-3.0) if padding else data
        found.append(take_step(loss, 0, [data.build(loss)]))
    torch.testing.assert_close(*found)


def test_a_loss_that_reads_nothing_has_no_gradient_and_changes_nothing() -> None:
    loss, without = (balanced("mgda", *names, "ipo") for names in (("sigmoid", "sft", "constant"), ("sigmoid", "sft")))
    for step in range(2):
        for each in (loss, without):
            gramian = take_step(each, step, [random_data("preference", seed=step).build(each)])
            if each is loss:
                assert not gramian[2].any() and not gramian[:, 2].any()
    loss.move_to_step(2)
    without.move_to_step(2)
    assert loss.factors.pop("constant2") == 1
    assert list(loss.factors.values()) == pytest.approx(list(without.factors.values()))


@pytest.mark.parametrize("how", ["eval", "no_grad", "detached"])
def test_nothing_is_observed_without_training(how: str) -> None:
    loss = balanced("upgrad", "sigmoid", "sft")
    data = random_data("preference")
    if how == "detached":
        data = data.with_rows(logps=data.rows["logps"].detach())
    loss.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        loss(*data.build(loss))
    assert loss.take_observed() == {}


# Splitting


def _split(data: Data, ranks: Sequence[Sequence[Sequence[int]]], style: str) -> list[list[tuple[Data, Denominators]]]:
    """Parts of a batch with the denominators that DPO's or GRPO's trainer gives them: one divides the loss by the
    number of micro-batches afterwards, for the other the loss does so itself."""
    whole, processes = data.denominators(), len(ranks)
    found = []
    for parts in ranks:
        divisor = processes * (len(parts) if style == "dpo" else 1)
        shared = Denominators(
            sequences=whole.sequences / divisor,
            tokens=whole.tokens / divisor,
            chosen_tokens=whole.chosen_tokens / divisor,
            micro_batches=1.0 if style == "dpo" else len(parts),
            step_fraction=1 / divisor,
        )
        found.append([(data.take(part), shared) for part in parts])
    return found


@pytest.mark.parametrize(
    "ranks",
    [[[[0], [1, 2, 3], [4, 5]]], [[[0, 1, 2]], [[3, 4, 5]]], [[[0], [1, 2]], [[3, 4], [5]]]],
    ids=["micro-batches", "ranks", "both"],
)
@pytest.mark.parametrize("family, style", [("preference", "dpo"), ("policy", "grpo")])
def test_the_gramian_and_the_factors_do_not_depend_on_how_a_batch_is_split(
    ranks: list, family: str, style: str
) -> None:
    names = {"preference": ["sigmoid", "sft", "ipo"], "policy": ["grpo", "dapo", "luspo"]}[family]
    whole = balanced("mgda", *names)
    replicas = [balanced("mgda", *names) for _ in ranks]
    for step in range(4):
        data = random_data(family, size=6, seed=step)
        expected = take_step(whole, step, [data.build(whole, data.denominators())])
        sums = torch.zeros_like(expected)
        total = torch.zeros((), dtype=torch.float64)
        for replica, parts in zip(replicas, _split(data, ranks, style), strict=True):
            replica.move_to_step(step)
            for part, shared in parts:
                value, _ = replica(*part.build(replica, shared))
                total += shared.step_fraction * value.detach()
            sums += replica.take_observed()["gramian"]
        torch.testing.assert_close(sums, expected)
        torch.testing.assert_close(total, whole(*data.build(whole, data.denominators()))[0].detach())
        whole.take_observed()
        for replica in replicas:
            replica.on_step_end(step, {"gramian": sums})
            assert list(replica.factors.values()) == pytest.approx(list(whole.factors.values()), rel=1e-6)
    assert list(whole.factors.values()) != [1.0] * 3
