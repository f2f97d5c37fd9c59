from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from itertools import pairwise
from math import cos, expm1, inf, log1p, nan, pi
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import (
    LossConfigError,
    LossFunctionRegistry,
    ModelOutputs,
    PreferenceBatch,
    PreferenceLoss,
    Ranks,
)
from trl_custom_losses.losses.preference import AdaptiveDPOLoss, SigmoidLoss
from trl_custom_losses.reductions import evaluate
from trl_custom_losses.registry import BuildContext
from trl_custom_losses.testing import random_data

from ..singles import column_pairs, pair_loss

MicroBatch = tuple[PreferenceBatch, ModelOutputs]

#: Schedule options of a run of 10 steps whose numbers are easy.
SCHEDULE = {"beta": 0.2, "final_beta": 0.02, "warmup_steps": 4, "decay_steps": 6}


def build(**options: Any) -> AdaptiveDPOLoss:
    return LossFunctionRegistry.build({"type": "adaptive_dpo", **options}, family="preference")


def pairs(*margins: float, mask: Sequence[int] | None = None) -> MicroBatch:
    """Pairs of one token each, of given log-ratio differences, in nats."""
    policy = [-1.0 + margin for margin in margins] + [-2.0] * len(margins)
    batch, outputs = column_pairs(policy, [-1.0] * len(margins) + [-2.0] * len(margins))
    outputs.per_token_logps.requires_grad_()
    return (batch if mask is None else batch.replace(pair_mask=torch.tensor(mask))), outputs


def drive(loss: AdaptiveDPOLoss, steps: Sequence[Sequence[MicroBatch]], first: int = 0, total: int = 10) -> list[float]:
    """Take a loss through optimizer steps of some micro-batches each, as the trainer does; the beta of each step."""
    betas = []
    loss.on_train_begin(total)
    for step, micro_batches in enumerate(steps, start=first):
        for part in loss.tree():
            part.move_to_step(step)
        logged = [float(evaluate(loss, *micro_batch)[1]["adaptive_beta"]) for micro_batch in micro_batches]
        betas.append(logged[0] if len(set(logged)) == 1 else logged)
        for part in loss.tree():
            part.on_step_end(step, {name: sums.double() for name, sums in part.take_observed().items()})
    return betas


def one_each(*margins: float) -> list[list[MicroBatch]]:
    """Steps of one pair each."""
    return [[pairs(margin)] for margin in margins]


# The schedule


def test_schedule_rises_over_the_warm_up_and_falls_along_a_cosine() -> None:
    expected = [0.02, 0.065, 0.11, 0.155, 0.2]
    expected += [0.02 + 0.18 * (1 + cos(pi * t / 6)) / 2 for t in range(1, 6)] + [0.02] * 3
    assert drive(build(**SCHEDULE), one_each(*[0.0] * 13)) == pytest.approx(expected)


def test_schedule_lasts_as_long_as_the_run_and_ends_at_a_tenth_unless_told_otherwise() -> None:
    betas = drive(build(beta=1.0, warmup_steps=2), one_each(*[0.0] * 8), total=6)
    assert betas == pytest.approx(
        [0.1, 0.55, 1.0, 0.1 + 0.9 * (1 + cos(pi / 4)) / 2, 0.55, 0.1 + 0.9 * (1 - cos(pi / 4)) / 2, 0.1, 0.1]
    )


def test_without_warm_up_it_begins_at_the_initial_beta() -> None:
    assert drive(build(beta=1.0, warmup_steps=0, decay_steps=2), one_each(0, 0, 0)) == pytest.approx([1.0, 0.55, 0.1])


def test_schedule_never_jumps() -> None:
    betas = drive(build(beta=1.0, warmup_steps=50, decay_steps=150), one_each(*[0.0] * 250))
    assert max(abs(after - before) for before, after in pairwise(betas)) < 0.9 / 50 + 1e-9
    assert max(betas) == 1.0 and betas[0] == betas[-1] == pytest.approx(0.1)


def test_schedule_has_no_state_and_starts_in_the_middle() -> None:
    loss = build(**SCHEDULE)
    assert not loss.state_dict()
    assert drive(loss, one_each(0, 0), first=3) == pytest.approx([0.155, 0.2])


def test_the_loss_is_the_wrapped_one_at_the_beta_of_the_step() -> None:
    loss = build(**SCHEDULE)
    drive(loss, one_each(0, 0, 0))
    assert loss.beta == pytest.approx(0.11) and loss.leaves() == [loss]
    assert pair_loss(loss, 3.0, -1.0) == pair_loss(SigmoidLoss(beta=loss.beta), 3.0, -1.0)


def test_before_a_run_beta_is_the_initial_one() -> None:
    assert pair_loss(build(beta=0.3), 2.0, 0.0) == pair_loss(SigmoidLoss(beta=0.3), 2.0, 0.0)


# Margins

MARGINS = [2.0, 5.0, -1.0, 4.0]
# M0 after each step: 2, then 0.9 M0 + 0.1 M.
AVERAGES = [2.0, 2.3, 1.97]
AFTER = [0.1 * (1 + 0.6 * (margin - average)) for margin, average in zip(MARGINS, AVERAGES, strict=False)]


def test_beta_follows_the_margin_of_the_step_before() -> None:
    assert pytest.approx([0.1, 0.262, -0.0782]) == AFTER
    assert drive(build(strategy="margin"), one_each(*MARGINS)) == pytest.approx([0.1, 0.1, 0.262, 0.001])


def test_with_lag_0_beta_follows_the_margin_at_hand() -> None:
    loss = build(strategy="margin", lag=0)
    assert loss.batch_coupled and not build(strategy="margin").batch_coupled
    assert drive(loss, one_each(*MARGINS)) == pytest.approx([0.1, 0.262, 0.001, 0.1 * (1 + 0.6 * 0.9 * (4 - 1.97))])


def test_with_lag_0_every_rank_has_the_same_beta() -> None:
    def shared(batch: PreferenceBatch, others: Tensor) -> PreferenceBatch:
        return batch.replace(ranks=Ranks(count=2, sum=lambda tensor: tensor + others))

    loss = build(strategy="margin", lag=0)
    drive(loss, one_each(2.0))
    batch, outputs = pairs(5.0, 8.0)
    sides = [
        (shared(batch, torch.tensor([2.0, 1.0])), outputs),
        (shared(pairs(2.0)[0], torch.tensor([13.0, 2.0])), pairs(2.0)[1]),
    ]
    assert drive(loss, [sides], first=1) == pytest.approx([0.1 * (1 + 0.6 * 0.9 * (5 - 2))])


def test_with_lag_0_beta_is_a_constant_to_the_gradient_and_read_without_waiting(monkeypatch) -> None:
    loss = build(strategy="margin", lag=0)
    drive(loss, one_each(2.0, 3.0))
    loss.move_to_step(2)
    batch, outputs = pairs(5.0, 1.0)

    def refuse(*args: Any) -> None:
        raise AssertionError("a tensor is moved to the host")

    with monkeypatch.context() as patched:
        for method in ("item", "tolist", "__bool__", "__float__"):
            patched.setattr(Tensor, method, refuse)
        raw, metrics = loss(batch, outputs)
        (gradient,) = torch.autograd.grad(raw.sum(), outputs.per_token_logps)
    assert not metrics["adaptive_beta"].requires_grad
    fixed, _ = SigmoidLoss(beta=metrics["adaptive_beta"].item())(batch, outputs)
    torch.testing.assert_close(gradient, torch.autograd.grad(fixed.sum(), outputs.per_token_logps)[0])


def test_the_split_into_micro_batches_does_not_matter() -> None:
    whole = drive(build(strategy="margin"), [[pairs(1.0, 4.0, -2.0)], [pairs(7.0, 0.0, 1.0)], [pairs(0.0)]])
    split = drive(
        build(strategy="margin"),
        [[pairs(1.0), pairs(4.0, -2.0)], [pairs(7.0, 0.0), pairs(1.0)], [pairs(0.0)]],
    )
    assert split == pytest.approx(whole) and whole[2] > 0.1


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_without_a_pair_do_not_count(lag: int) -> None:
    masked = [[pairs(2.0, nan, mask=[1, 0])], [pairs(5.0, 99.0, mask=[1, 0])], [pairs(5.0, inf, mask=[1, 0])]]
    plain = drive(build(strategy="margin", lag=lag), one_each(2.0, 5.0, 5.0))
    assert drive(build(strategy="margin", lag=lag), masked) == pytest.approx(plain)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("bad", [pairs(nan, 1.0), pairs(inf), pairs(3.0, mask=[0])], ids=["nan", "inf", "no pair"])
def test_a_margin_that_is_not_finite_leaves_everything_as_it_is(bad: MicroBatch, lag: int) -> None:
    loss = build(strategy="margin", lag=lag)
    drive(loss, one_each(2.0, 5.0))
    before, beta = copy.deepcopy(loss.state_dict()), 0.1 if lag == 0 else 0.262
    assert drive(loss, [[bad]], first=2) == pytest.approx([beta])
    assert {name: value.item() for name, value in loss.state_dict().items()} == {
        name: value.item() for name, value in before.items()
    }


def test_scale_and_decay_are_the_users() -> None:
    loss = build(strategy="margin", margin_scale=0.1, margin_decay=0.5)
    assert drive(loss, one_each(2.0, 6.0, 0.0)) == pytest.approx([0.1, 0.1, 0.1 * (1 + 0.1 * (6 - 4))])


# KL


def completions(*log_ratios: float, mask: Sequence[int] | None = None) -> MicroBatch:
    """Completions of two tokens, the second of which has not moved, of given log-ratios: chosen, then rejected."""
    found = torch.ones(len(log_ratios), 2, dtype=torch.long)
    ref = torch.full(found.shape, -2.0, dtype=torch.float64)
    logps = ref + torch.tensor([[ratio, 0.0] for ratio in log_ratios], dtype=torch.float64)
    batch = PreferenceBatch(input_ids=found, attention_mask=found, mask=found)
    outputs = ModelOutputs(per_token_logps=logps.requires_grad_(), ref_per_token_logps=ref, mask=found)
    return (batch if mask is None else batch.replace(pair_mask=torch.tensor(mask))), outputs


def k3(log_ratio: float) -> float:
    return expm1(-log_ratio) + log_ratio


def test_beta_is_moved_by_the_distance_from_the_reference() -> None:
    loss = build(strategy="kl", target_kl=0.5, horizon=20)
    kl = (k3(1.0) + k3(-0.9)) / 2
    assert 0.4 < kl < 0.6 and abs(kl / 0.5 - 1) < 0.2
    steps = [
        [completions(1.0, -0.9)],
        [completions(3.0, 3.0, 3.0, 3.0)],
        [completions(0.0, 0.0)],
        [completions(0.0, 0.0)],
    ]
    first = 1 + (kl / 0.5 - 1) * 2 / 20
    expected = [
        0.1,
        0.1 * first,
        0.1 * first * (1 + 0.2 * 4 / 20),
        0.1 * first * (1 + 0.2 * 4 / 20) * (1 - 0.2 * 2 / 20),
    ]
    assert drive(loss, steps) == pytest.approx(expected)


def test_beta_rises_when_the_policy_is_too_far_and_falls_when_it_is_near() -> None:
    far = drive(build(strategy="kl", target_kl=0.1, horizon=100), [[completions(2.0, -2.0)]] * 4)
    near = drive(build(strategy="kl", target_kl=10.0, horizon=100), [[completions(0.1, -0.1)]] * 4)
    assert far == sorted(far) and far[-1] > far[0] and near == sorted(near, reverse=True) and near[-1] < near[0]


def test_kl_is_reported_as_the_mean_over_completions_of_the_sum_over_tokens() -> None:
    loss = build(strategy="kl", target_kl=1.0)
    loss.move_to_step(0)
    loss(*completions(1.0, -1.0))
    loss(*completions(2.0, nan, 0.5, 3.0, mask=[1, 0]))  # the second row, NaN and 3, holds no pair
    metrics = loss.on_step_end(0, {name: sums.double() for name, sums in loss.take_observed().items()})
    assert metrics == {"adaptive_kl": pytest.approx((k3(1.0) + k3(-1.0) + k3(2.0) + k3(0.5)) / 4)}


def test_beta_stays_positive_and_comes_back_from_the_floor() -> None:
    loss = build(strategy="kl", target_kl=1.0, horizon=1)
    betas = drive(loss, [[completions(0.0, 0.0)]] * 20 + [[completions(9.0, 9.0)]] * 2)
    assert betas[:3] == pytest.approx([0.1, 0.1 * 0.6, 0.1 * 0.36])
    assert min(betas) == 0.001 and betas[20:] == pytest.approx([0.001, 0.0014])
    many = drive(build(strategy="kl", target_kl=1.0, horizon=1), [[completions(*[0.0] * 60)]] * 2)
    assert many == pytest.approx([0.1, 0.05])  # 1 - 0.2 x 60 would be negative


@pytest.mark.parametrize("bad", [completions(nan, 1.0), completions(inf, 0.0)], ids=["nan", "inf"])
def test_a_kl_that_is_not_finite_leaves_beta_as_it_is(bad: MicroBatch) -> None:
    loss = build(strategy="kl", target_kl=0.1, horizon=100)
    before = drive(loss, [[completions(2.0, -2.0)]] * 2)
    after = drive(loss, [[bad], [bad]], first=2)
    assert after[0] == after[1] > before[1]


def test_a_very_unlikely_token_does_not_overflow() -> None:
    batch, outputs = completions(-500.0, 500.0)
    single = {name: getattr(outputs, name).float() for name in ("per_token_logps", "ref_per_token_logps")}
    followed = build(strategy="kl", target_kl=1.0).mover.followed(batch, outputs.replace(**single))
    assert followed.dtype is torch.float32 and followed.isfinite().all()


# The run


@pytest.mark.parametrize(
    "options", [{"strategy": "margin"}, {"strategy": "margin", "lag": 0}, {"strategy": "kl", "target_kl": 0.1}]
)
def test_evaluation_moves_nothing_and_uses_the_last_beta(options: dict) -> None:
    loss = build(horizon=10, **options) if options["strategy"] == "kl" else build(**options)
    steps = [[completions(1.0, -1.0)], [completions(3.0, 0.5)], [completions(1.0, 1.0)]]
    drive(loss, steps)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    betas = {loss(*completions(first, -first))[1]["adaptive_beta"].item() for first in (0.1, 3.0, 20.0)}
    assert len(betas) == 1 and not loss.take_observed()
    assert all(torch.equal(value, loss.state_dict()[name]) for name, value in before.items())
    if options.get("lag") != 0:
        assert betas == {loss.beta}


@pytest.mark.parametrize(
    "options",
    [SCHEDULE, {"strategy": "margin"}, {"strategy": "margin", "lag": 0}, {"strategy": "kl", "target_kl": 0.7}],
)
def test_saved_state_continues_bit_for_bit(options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [[completions(*torch.randn(4, generator=generator).tolist()) for _ in range(2)] for _ in range(8)]
    whole, begun, resumed = (build(**options) for _ in range(3))
    expected = drive(whole, steps)
    drive(begun, steps[:3])
    resumed.load_state_dict(begun.state_dict())
    assert drive(resumed, steps[3:], first=3) == expected[3:]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_state_stays_on_the_host_in_double_precision() -> None:
    loss = build(strategy="margin").to(torch.float16).to("meta")
    assert {(value.device.type, value.dtype) for value in loss.state_dict().values()} == {
        ("cpu", torch.float64),
        ("cpu", torch.int64),
    }


# The wrapped loss


def test_is_transparent() -> None:
    for name in LossFunctionRegistry.names("preference"):
        found = LossFunctionRegistry.get(name)
        if "beta" not in found.declared_hyperparameters() or found.composite or name == "adaptive_dpo":
            continue
        needed = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        base = LossFunctionRegistry.build({"type": name, "beta": 0.1, **needed})
        loss = build(base={"type": name, **needed})
        for fact in ("requires", "columns", "reduction", "batch_coupled", "minimum_batch", "pair_weighting"):
            assert getattr(loss, fact) == getattr(base, fact), (name, fact)
        assert loss.f_divergence == base.f_divergence
        data = random_data("preference")
        raw, metrics = loss(*data.build(loss))
        expected, reported = base(*data.build(base))
        assert torch.equal(raw, expected) and metrics.keys() == reported.keys() | {"adaptive_beta"}


def test_needs_what_it_follows() -> None:
    def reference_free(batch: PreferenceBatch, outputs: ModelOutputs, *, beta: float = 2.0) -> tuple[Tensor, dict]:
        return -beta * outputs.logps.chunk(2)[0], {}

    LossFunctionRegistry.register("reference_free_for_adaptive")(reference_free)
    try:
        assert build(base="reference_free_for_adaptive").requires == set()
        assert build(base="reference_free_for_adaptive", strategy="margin").requires == {"ref_logps"}
        kl = build(base="reference_free_for_adaptive", strategy="kl", target_kl=1.0)
        assert kl.requires == {"ref_per_token_logps"} and kl.beta == 0.1
    finally:
        del LossFunctionRegistry._functions["reference_free_for_adaptive"]


def test_the_wrapped_loss_takes_part_in_the_run() -> None:
    smoothing = {"schedule": "linear", "start": 0.0, "end": 0.4, "total_steps": 4}
    loss = build(base={"type": "robust", "label_smoothing": smoothing}, warmup_steps=2)
    drive(loss, [[pairs(1.0)]] * 2)
    _, metrics = evaluate(loss, *pairs(1.0))
    assert metrics["label_smoothing"] == pytest.approx(0.1) and loss.base.label_smoothing == pytest.approx(0.1)
    assert [part.name for part in loss.tree()] == ["adaptive_dpo", "robust"]


def test_falls_back_to_the_trainers_beta_under_either_name() -> None:
    context = BuildContext(family="preference", defaults={"beta": 0.25, "f_divergence_type": "js_divergence"})

    def built(**options: Any) -> AdaptiveDPOLoss:
        return LossFunctionRegistry.build({"type": "adaptive_dpo", **options}, context=context)

    assert built().initial_beta == built().beta == 0.25 and built().base.f_divergence_type == "js_divergence"
    assert built(reference_policy_kl_penalty=0.5).initial_beta == 0.5
    assert built(beta=0.5).base.origins["beta"] == "adaptive_dpo"
    with pytest.raises(LossConfigError, match="given twice"):
        built(beta=0.5, reference_policy_kl_penalty=0.5)


def test_what_the_schedule_reads_may_move() -> None:
    loss = build(
        beta=1.0, warmup_steps=10, final_beta={"schedule": "linear", "start": 0.1, "end": 0.5, "total_steps": 2}
    )
    assert drive(loss, one_each(0, 0, 0)) == pytest.approx([0.1, 0.3 + 0.07, 0.5 + 0.1])


def test_an_object_can_be_wrapped() -> None:
    loss = AdaptiveDPOLoss(base=SigmoidLoss(beta=9.0), beta=0.5)
    assert loss.base.beta == loss.beta == 0.5 and "beta" in loss.base.hyperparameters()
    assert pair_loss(loss, 2.0, 0.0) == pytest.approx(log1p(2.718281828459045**-1))
    assert pair_loss(AdaptiveDPOLoss(), 0.0, 0.0) == pytest.approx(log1p(1))


def test_tells_what_was_given() -> None:
    loss = build(**SCHEDULE)
    drive(loss, one_each(0, 0))
    assert loss.hyperparameters()["beta"] == 0.2 and "base" not in loss.hyperparameters()
    assert "final_beta=0.02" in repr(loss)


# Refusals


class Caching(PreferenceLoss):
    """Computes something from beta once and for all."""

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta, self.target = beta, 1 / beta

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return model_outputs.logps.chunk(2)[0] - self.target, {}


class Forgetting(Caching):
    """Does not keep its beta."""

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__(beta=beta)
        del self.beta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": {"type": "ipo", "beta": 0.1}}, "sets its beta; move 'beta' out of 'base'"),
        ({"base": "sft"}, "'sft' has no beta that could move; these have one: aot, .*sigmoid"),
        ({"base": {"type": "composed", "components": [{"type": "sigmoid"}]}}, "'composed' has no beta"),
        ({"base": "adaptive_dpo"}, "'adaptive_dpo', which is made of losses"),
        ({"base": "grpo"}, "'grpo' has no beta"),
        ({"base": "sigmiod"}, "did you mean 'sigmoid'"),
        ({"base": {"beta": 0.1}}, "'base': expected a loss's name or a dict with 'type'"),
        ({"base": {"type": "robust", "label_smoothing": 0.7}}, "label_smoothing"),
        ({"base": f"{__name__}:Caching"}, "`target` is computed from it"),
        ({"base": f"{__name__}:Forgetting"}, "has no beta that could move"),
        ({"beta": {"schedule": "linear", "start": 0.1, "end": 0.2}}, "'beta' is where adaptive_dpo starts from"),
        ({"beta": 0.0}, "beta"),
        ({"final_beta": -0.1}, "final_beta"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"decay_steps": 0}, "decay_steps"),
        ({"strategy": "cosine"}, "strategy"),
        ({"strategy": "margin", "lag": 2}, "lag"),
        ({"strategy": "margin", "margin_decay": 1.0}, "margin_decay"),
        ({"strategy": "margin", "margin_scale": -0.1}, "margin_scale"),
        ({"strategy": "margin", "beta": 1e-4}, "'margin' holds beta at 0.001 or above"),
        ({"strategy": "kl"}, "needs the hyperparameter 'target_kl'"),
        ({"strategy": "kl", "target_kl": 0.0}, "target_kl"),
        ({"strategy": "kl", "target_kl": 1.0, "horizon": 0}, "horizon"),
        ({"target_kl": 1.0}, "'target_kl' belongs to the strategy 'kl' and has no effect with 'schedule'"),
        ({"strategy": "kl", "target_kl": 1.0, "final_beta": 0.1}, "'final_beta' belongs to the strategy 'schedule'"),
        ({"margin_scale": 0.5}, "'margin_scale' belongs to the strategy 'margin'"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        build(**options)


def test_refuses_objects_whose_beta_cannot_move() -> None:
    scheduled = LossFunctionRegistry.build(
        {"type": "sigmoid", "beta": {"schedule": "linear", "start": 0.1, "end": 0.2, "total_steps": 2}}
    )
    with pytest.raises(LossConfigError, match="is on a schedule"):
        AdaptiveDPOLoss(base=scheduled)
    with pytest.raises(LossConfigError, match="made of losses"):
        AdaptiveDPOLoss(base=build())
    with pytest.raises(LossConfigError, match="a policy loss"):
        AdaptiveDPOLoss(base=LossFunctionRegistry.build("grpo"))


def test_a_warm_up_that_the_run_does_not_reach_the_end_of_is_said() -> None:
    with pytest.warns(UserWarning, match="warm-up of 10 steps is not over when the run ends after 10"):
        AdaptiveDPOLoss(warmup_steps=10).on_train_begin(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveDPOLoss(warmup_steps=9).on_train_begin(10)
        AdaptiveDPOLoss(strategy="margin").on_train_begin(10)


def test_a_subclass_that_hears_of_a_steps_end_observes() -> None:
    class Listening(AdaptiveDPOLoss):
        def on_step_end(self, step: int, observed: Any) -> None:
            return None

    assert Listening().observes and not AdaptiveDPOLoss().observes and AdaptiveDPOLoss(strategy="margin").observes
