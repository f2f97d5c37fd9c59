"""Gradients: right, there, and only where they belong."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...base import Loss
from ..batches import Data
from ..check import check, fail, require_equal, require_finite
from ..stopped_gradients import HeldConstants
from ..subject import Subject

_STEP = 1e-6
_MOST_ELEMENTS = 24  # of each input that are varied


@check(
    usual_cause="a part of the loss is detached that should not be, or computed under `no_grad`. If that is meant, as "
    "in "
    "CISPO's importance weights, declare `stop_gradient = True`. Small deviations come from a lower precision",
)
def gradient(subject: Subject) -> None:
    """The gradient is the derivative of the loss, in float64 and away from kinks; of a loss that declares
    `stop_gradient`, with what it detaches held fixed.
    """
    for seed in (0, 1, 2):
        loss, data = subject.build(), subject.data(size=3, length=3, seed=seed)
        held: AbstractContextManager = HeldConstants() if loss.stop_gradient else contextlib.nullcontext()
        value = _value(loss, data, held)
        for name, analytic in data.gradients(loss, value).items():
            _compare(loss, data, name, analytic, value.detach(), held)


def _value(loss: Loss, data: Data, held: AbstractContextManager) -> Tensor:
    for part in loss.tree():
        part.take_observed()
    with held:
        return data.loss(loss)


def _compare(loss: Loss, data: Data, name: str, analytic: Tensor, value: Tensor, held: AbstractContextManager) -> None:
    """Compare a gradient with difference quotients, except at elements where the loss has a kink."""
    base = data.rows[name].detach()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(base.numel(), generator=generator)[:_MOST_ELEMENTS].tolist()
    expected, kinks = (
        analytic.clone(memory_format=torch.contiguous_format),
        0,
    )  # where nothing is compared, nothing differs
    for element in chosen:
        sides = []
        for step in (_STEP, -_STEP):
            moved = base.clone()
            moved.view(-1)[element] += step
            sides.append(_value(loss, data.with_rows(**{name: moved.requires_grad_()}), held).detach())
        slope, bend = (sides[0] - sides[1]) / (2 * _STEP), (sides[0] - 2 * value + sides[1]).abs() / _STEP
        if bend > 1e-3 * (1 + slope.abs()):
            kinks += 1
        else:
            expected.view(-1)[element] = slope
    if kinks > len(chosen) // 2:
        fail(f"the loss has no derivative at {kinks} of {len(chosen)} random points of {_INPUTS[name]}: it jumps")
    require_equal(
        analytic,
        expected,
        f"the gradient with respect to {_INPUTS[name]}",
        versus="the difference quotient is",
        relative=1e-5,
        absolute=1e-7,
    )


_INPUTS = {
    "logps": "`per_token_logps`",
    "entropies": "`entropies`",
    "hidden": "`pooled_hidden`",
    "logits": "`logits`",
    "second_logits": "`second_logits`",
}


@check(
    usual_cause="the policy's log-probabilities are detached, or taken for the reference's; a model inside the loss "
    "is in "
    "evaluation mode but its parameters were not frozen with `requires_grad_(False)`",
)
def gradient_reaches_the_policy(subject: Subject) -> None:
    """A gradient reaches the policy, and neither the reference nor the generating policy nor anything frozen in the
    loss.
    """
    loss, data = subject.build(), subject.data()
    fixed = {name: data.rows[name].clone().requires_grad_() for name in ("ref", "old")}
    data = data.with_rows(**fixed)
    value = data.loss(loss)
    found = data.gradients(loss, value)
    largest = max(float(gradient.abs().max()) for gradient in found.values())
    if not largest > 0:
        fail(f"no gradient reaches the policy: it is 0 with respect to {' and '.join(_INPUTS[name] for name in found)}")
    frozen = {
        f"the frozen parameter '{name}'": parameter
        for name, parameter in loss.named_parameters()
        if parameter.requires_grad and not _module_of(loss, name).training
    }
    inputs = {"the reference": fixed["ref"], "the generating policy": fixed["old"], **frozen}
    learned = {name: p for name, p in loss.named_parameters() if p.requires_grad and _module_of(loss, name).training}
    for name, parameter in learned.items():
        if torch.autograd.grad(value, parameter, retain_graph=True, allow_unused=True)[0] is None:
            fail(f"the loss's own parameter '{name}' is not part of the loss, so that it would not be trained")
    gradients = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    for what, gradient in zip(inputs, gradients, strict=True):
        if gradient is not None and gradient.any():
            fail(f"{what} gets a gradient of up to {float(gradient.abs().max()):.3g}")


@check(
    usual_cause="a sign is wrong, or chosen and rejected are exchanged (rows are chosen first, then rejected). An "
    "auxiliary term declares `prefers_chosen = False` (preference) or `surrogate = False` (policy)"
)
def direction(subject: Subject) -> str | None:
    """While the policy is the reference and the one that sampled, a step down the gradient makes chosen completions
    likelier than rejected ones, unless the loss declares `prefers_chosen = False`; and, for a surrogate, completions of
    positive advantage likelier than those of negative advantage.
    """
    loss = subject.build()
    rows = subject.data().rows["mask"].size(0)
    data = subject.data(length=3, lengths=[3] * rows)
    data = data.with_rows(ref=data.rows["logps"].detach(), old=data.rows["logps"].detach())
    advantages = data.items["advantages"]
    data = dataclasses.replace(data, items=data.items | {"advantages": advantages - advantages.mean()})
    leaves = [leaf for leaf in loss.leaves() if leaf.family == data.family]
    fact = "prefers_chosen" if data.family == "preference" else "surrogate"
    for leaf in leaves:
        if getattr(leaf, fact):
            _direction(leaf, data)
    free = [leaf.name for leaf in leaves if not getattr(leaf, fact)]
    return f"{', '.join(free)}: `{fact} = False`" if free else None


def _direction(loss: Loss, data: Data) -> None:
    gradients = data.gradients(loss)
    found = gradients["logps"]
    if "logits" in gradients:  # raising a token's logit raises its log-probability
        found = found + gradients["logits"].gather(-1, data.rows["ids"].unsqueeze(-1)).squeeze(-1)
    if data.family == "preference":
        chosen, rejected = (side.sum() for side in found.chunk(2))
        slope, what = chosen - rejected, "as chosen log-probabilities rise and rejected ones fall"
    else:
        batch, _ = data.build(loss)
        slope = (found * batch.advantages).sum()
        what = "as log-probabilities rise where the advantage is positive"
    if not slope < -1e-9 * found.abs().sum():
        fail(f"the loss of '{loss.name}' changes by {float(slope):+.3g} a nat {what}, but it should fall")


def _module_of(loss: Loss, parameter: str) -> torch.nn.Module:
    return loss.get_submodule(parameter.rpartition(".")[0])


@check(
    usual_cause="`logits` or hidden states are used without `outputs.mask`, a mean divides by the number of positions "
    "instead of `outputs.lengths`, or a masked value is multiplied by 0 where it should be replaced (0 x NaN "
    "is NaN)",
)
def masked_positions(subject: Subject) -> None:
    """Masked positions neither count nor get a gradient, whatever stands there."""
    loss = subject.build()
    rows = subject.data().rows["mask"].size(0)
    data = subject.data(length=4, lengths=[(1, 4, 2, 3, 3, 1, 4, 2)[row % 8] for row in range(rows)])
    clean = data.loss(loss)
    expected = data.gradients(loss, clean)
    hidden = data.rows["mask"] == 0
    # Logits have no framework in front of them that takes masked values away, but they are always finite.
    finite = {"logits", "second_logits"} & set(data.leaves(loss))
    for garbage in (-7.0, 1e5, float("inf"), float("nan")):
        names = {"logps", "ref", "old", "entropies"} | (finite if abs(garbage) < 1e9 else set())
        dirty = {}
        for name in names:
            original = data.rows[name]
            mask = hidden.view(*hidden.shape, *[1] * (original.dim() - 2))
            dirty[name] = original.detach().masked_fill(mask, garbage).requires_grad_(original.requires_grad)
        dirtied, what = data.with_rows(**dirty), f"with {garbage} at masked positions"
        value = dirtied.loss(subject.build())
        if not torch.equal(value, clean):
            fail(f"the loss is {float(value):.8g} {what}, and {float(clean):.8g} without")
        for name, gradient in dirtied.gradients(loss, value).items():
            if name == "hidden":
                continue
            at_masked = gradient[hidden]
            if not (at_masked == 0).all():
                largest = at_masked.abs().nan_to_num(torch.inf).max()
                fail(f"masked positions of {_INPUTS[name]} get a gradient of up to {float(largest):.3g} {what}")
            require_equal(
                gradient[~hidden],
                expected[name][~hidden],
                f"the gradient with respect to scored positions of {_INPUTS[name]}, {what},",
                versus="without it is",
                relative=0,
                absolute=0,
            )


@check(
    usual_cause="constants or buffers of a half-precision dtype; logits and hidden states used without `.float()`",
)
def half_precision(subject: Subject) -> None:
    """Half-precision inputs are computed in float32, and give half-precision gradients."""
    for size in (2, 3):
        loss, data = subject.as_built(), subject.data(size=size, dtype=torch.float32)
        precise = {name: value for name, value in data.rows.items() if value.is_floating_point()}
        half = {name: value.detach().bfloat16() for name, value in precise.items()}
        data = data.with_rows(**{name: v.requires_grad_(precise[name].requires_grad) for name, v in half.items()})
        value = data.loss(loss)
        if value.dtype is not torch.float32:
            fail(f"for bfloat16 inputs the loss is {value.dtype}; its arithmetic must be float32")
        full = data.with_rows(**{name: v.float() for name, v in half.items()}).loss(subject.as_built())
        if not torch.equal(value, full):
            fail(
                f"for bfloat16 inputs the loss is {float(value):.8g}; in float32 the same numbers give "
                f"{float(full):.8g}"
            )
        for name, gradient in data.gradients(loss, value).items():
            require_finite(gradient, f"the bfloat16 gradient with respect to {_INPUTS[name]}")
