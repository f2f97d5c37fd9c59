"""What the gradient monitor reports, on numbers worked out by hand and on made-up runs."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import TrainerState

from trl_custom_losses import (
    ComposableLossFunction,
    LossConfigError,
    LossFunctionRegistry,
    ModelOutputs,
    PolicyBatch,
)
from trl_custom_losses.balancing.gramian import WATCHED, WATCHED_WEIGHTED, watched_metrics
from trl_custom_losses.callbacks import GradientMonitorCallback, LossFunctionCallback
from trl_custom_losses.callbacks.gradient_monitor import layer_norms, monitored, name_layers
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.testing import random_data

from .runs import Run, Slopes, one_pair, two

# By hand: a is (3, 3, 0, 0) on the four tokens, b is (1, 1, -2, -2).


@pytest.mark.parametrize("first", ["monitor", "driver"])
def test_norms_and_cosines_by_hand(first: str) -> None:
    found = Run(two(weights={"a": 2.0, "b": 0.5}), first=first).step(one_pair())
    assert found == pytest.approx(
        {
            "grad_norm/a": math.sqrt(18),
            "grad_norm/b": math.sqrt(10),
            "grad_norm_weighted/a": 2 * math.sqrt(18),
            "grad_norm_weighted/b": 0.5 * math.sqrt(10),
            "grad_norm/total": math.sqrt(2 * 6.5**2 + 2),
            "grad_cosine/a/b": 6 / math.sqrt(180),
        }
    )


def test_components_that_cancel_have_no_total() -> None:
    loss = ComposableLossFunction({"a": Slopes(chosen=0.1), "b": Slopes(chosen=-0.3)}, {"a": 3.0})
    found = Run(loss).step(one_pair())
    assert found["grad_norm/total"] == pytest.approx(0, abs=1e-6) and found["grad_cosine/a/b"] == pytest.approx(-1)
    assert found["grad_norm_weighted/a"] == pytest.approx(found["grad_norm/b"])


def test_rounding_below_nothing_is_nothing_and_nan_is_nan() -> None:
    observed = {name: torch.full((2, 2), value).double() for name, value in (("a", -1e-12), ("b", math.nan))}
    for name, expected in (("a", 0.0), ("b", math.nan)):
        found = watched_metrics(two(), {WATCHED: torch.eye(2), WATCHED_WEIGHTED: observed[name]})
        assert found["grad_norm/total"] == pytest.approx(expected, abs=0, nan_ok=True)


def test_a_single_loss_has_its_norm_alone() -> None:
    loss = Slopes(chosen=1.0, rejected=-2.0)
    loss.name = "slopes"
    assert Run(loss).step(one_pair()) == {"grad_norm/slopes": pytest.approx(math.sqrt(10))}


def test_micro_batches_and_ranks_are_one_step() -> None:
    """Two micro-batches on each of three processes, which sum them, halve them and average them."""
    parts = [one_pair(chosen, rejected, sequences=0.5, step_fraction=1 / 6) for chosen, rejected in ((1, 2), (3, 0))]
    found = Run(two(), world=3).step(*parts)
    # Every token's slope is (1 / 0.5) / 6 of its own; 4 chosen and 2 rejected ones on three processes.
    assert found["grad_norm/a"] == pytest.approx(math.sqrt(3 * 4 * 3**2) / 3)
    assert found["grad_norm/b"] == pytest.approx(math.sqrt(3 * (4 * 1 + 2 * 4)) / 3)
    assert found["grad_cosine/a/b"] == pytest.approx(3 * 4 * 3 / math.sqrt(3 * 4 * 9 * 3 * 12))


@pytest.mark.parametrize("source", ["previous", "current"])
def test_cosines_are_those_of_balancing_and_weights_those_in_force(source: str) -> None:
    balancing = {"type": "upgrad", "gramian": source}
    opposed = {"a": Slopes(chosen=3.0), "b": Slopes(chosen=-2.0, rejected=1.0)}
    run = Run(ComposableLossFunction(opposed, balancing=balancing))
    alone = LossFunctionCallback(run.loss, run, (told := []).append)
    for _ in range(2):
        found = run.step(one_pair())
        assert len(run.logged) == 1 and found["grad_cosine/a/b"] == pytest.approx(-12 / math.sqrt(18 * 10))
        for name, norm in (("a", 18**0.5), ("b", 10**0.5)):
            assert found[f"grad_norm_weighted/{name}"] == pytest.approx(run.loss.factors[name] * norm)
    assert any(factor != 1 for factor in run.loss.factors.values())
    run.monitor.detach()
    run.loss(*one_pair())
    alone.on_step_end(None, run.state, None)
    assert told == [{"grad_cosine/a/b": found["grad_cosine/a/b"]}]


# When


def test_other_steps_and_evaluation_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = Run(two(), every=3), []
    plain = ModelOutputs.slopes
    monkeypatch.setattr(ModelOutputs, "slopes", lambda self, loss: asked.append(1) or plain(self, loss))
    for number in range(1, 8):
        found = run.step(one_pair())
        assert bool(found) == (number % 3 == 0), number
        assert len(asked) == 2 * (number // 3) and run.reductions == number // 3
        pair = one_pair()
        run.loss.eval()
        run.loss(*pair)
        run.loss.train()
        with torch.no_grad():
            run.loss(*pair)
    assert run.loss.take_observed() == {} and len(asked) == 4


def test_a_loss_is_left_as_it_was_even_after_an_error() -> None:
    loss, monitor = two(), GradientMonitorCallback()
    with pytest.raises(ZeroDivisionError), monitored([monitor], loss, Run(two()), print):
        monitor.on_step_begin(None, TrainerState(global_step=49), None)
        assert all(part.watched for part in loss.tree())
        raise ZeroDivisionError
    assert not any(part.watched for part in loss.tree())
    with pytest.raises(LossConfigError, match="needs one with a `loss_function`"):
        monitor.on_train_begin(None, TrainerState(max_steps=1), None)


def test_what_a_loss_observes_for_itself_reaches_it_as_before() -> None:
    seen = []

    class Curious(SigmoidLoss):
        def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            self.observe("n", torch.ones(()))
            return super().forward(batch, model_outputs)

        def on_step_end(self, step: int, observed: Any) -> dict[str, float]:
            seen.append(dict(observed))
            return {"mine": 1.0}

    loss = Curious()
    found = Run(loss).step(random_data("preference").build(loss))
    assert seen == [{"n": torch.ones(())}] and set(found) == {"mine", "grad_norm/"}


def test_a_run_without_a_monitored_step_is_told(caplog: pytest.LogCaptureFixture) -> None:
    monitor = GradientMonitorCallback(every=50)
    monitor.attach(two(), Run(two()), print)
    for first, last, warned in ((0, 49, True), (0, 50, False), (50, 99, True), (49, 50, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            monitor.on_train_begin(None, TrainerState(global_step=first, max_steps=last), None)
        assert ("will monitor nothing" in caplog.text) == warned


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"every": True}, {"every": "9"}, {"layers": "yes"}])
def test_malformed_options_are_refused(options: dict) -> None:
    with pytest.raises(LossConfigError, match=rf"'{next(iter(options))}': expected .*, found"):
        GradientMonitorCallback(**options)


def test_two_monitors_are_refused() -> None:
    monitors = [GradientMonitorCallback(), GradientMonitorCallback()]
    with pytest.raises(LossConfigError, match="found 2"), monitored(monitors, two(), Run(two()), print):
        pass


# Clipping


def clipped_share(
    config: dict, ratios: list[list[float]], advantages: list[float], **masks: list[list[float]]
) -> float | None:
    """What a loss reports of completions whose tokens have these ratios; NaN ends a completion."""
    loss = LossFunctionRegistry.build(config, family="policy")
    loss.watched = True
    ratio = torch.tensor(ratios)
    mask = (~ratio.isnan()).long()
    logps = torch.full_like(ratio, -1.0)
    outputs = ModelOutputs(
        per_token_logps=(logps + ratio.log().nan_to_num()).requires_grad_(), old_per_token_logps=logps, mask=mask
    )
    batch = PolicyBatch(
        prompt_ids=mask,
        completion_ids=mask,
        mask=mask,
        advantages=torch.tensor(advantages).unsqueeze(1),
        **{name: torch.tensor(values) for name, values in masks.items()},
    )
    raw, metrics = loss(batch, outputs)
    if "clipped_sequences" not in metrics:
        return None
    metric = metrics["clipped_sequences"]
    # The clip acts where the loss does not follow the ratio.
    (slopes,) = torch.autograd.grad(raw.sum(), outputs.per_token_logps)
    if config["type"] == "grpo" and not masks:
        flat = (slopes == 0) & (mask > 0) & (batch.advantages != 0)
        assert flat.any(1).float().tolist() == metric.value.tolist()
    return float((metric.value * metric.mask).sum() / metric.mask.sum())


NAN = math.nan
CLIPS = [
    ({"type": "grpo"}, [[1.0, 1.3], [1.0, 1.3], [0.7, 1.0], [0.7, 1.0]], [1, -1, 1, -1], 0.5),
    ({"type": "grpo"}, [[1.19, 0.81], [0.7, 1.3], [1.3, NAN], [NAN, NAN]], [1, 0, 1, 1], 1 / 3),
    ({"type": "grpo", "epsilon_high": 0.4}, [[1.3, 1.0], [1.5, 1.0]], [1, 1], 0.5),
    ({"type": "grpo", "delta": 2.0}, [[2.1, 1.0], [1.9, 1.0], [2.1, 1.0]], [-1, -1, 1], 2 / 3),
    ({"type": "grpo", "delta": 1.1}, [[1.15, 1.0], [1.15, 1.0], [1.3, 1.0]], [-1, 1, -1], 2 / 3),
    ({"type": "grpo", "importance_sampling_level": "sequence"}, [[2.0, 0.5], [2.0, 1.0]], [1, 1], 0.5),
    ({"type": "cispo", "epsilon_high": 2.0}, [[2.5, 1.0], [2.5, 1.0], [2.5, 1.0], [0.1, 1.9]], [1, -1, 0, 1], 0.5),
    ({"type": "cispo"}, [[0.1, NAN], [0.1, 0.3]], [1, 1], 0.5),
    ({"type": "sapo"}, [[9.0, 1.0]], [1], None),
    ({"type": "vespo"}, [[9.0, 1.0]], [1], None),
]


@pytest.mark.parametrize("config, ratios, advantages, share", CLIPS)
def test_clipped_sequences_by_hand(config: dict, ratios: list, advantages: list, share: float | None) -> None:
    assert clipped_share(config, ratios, advantages) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize("kind", ["grpo", "cispo"])
@pytest.mark.parametrize(
    "masks, share",
    [
        ({}, 1.0),
        ({"entropy_mask": [[1.0, 0.0], [0.0, 1.0]]}, 0.5),
        ({"importance_sampling_ratio": [[2.0, 0.0], [2.0, 1.0]]}, 0.5),
        ({"on_policy_mask": [[0.0], [0.0]]}, 1.0),
    ],
)
def test_tokens_that_are_dropped_are_not_clipped(kind: str, masks: dict, share: float) -> None:
    config = {"type": kind, "epsilon": 0.2, "epsilon_high": 1.3 if kind == "cispo" else 0.2}
    assert clipped_share(config, [[1.0, 1.5], [1.5, 1.5]], [1, 1], **masks) == share


def test_sequences_that_have_drifted_are_not_clipped() -> None:
    drifted = {"on_policy_mask": [[0.0], [1.0]]}
    assert clipped_share({"type": "grpo"}, [[0.5, 0.5], [0.5, 0.5]], [-1, -1]) == 1
    assert clipped_share({"type": "grpo"}, [[0.5, 0.5], [0.5, 0.5]], [-1, -1], **drifted) == 0.5


def test_clipped_sequences_are_reported_to_a_monitor_alone() -> None:
    loss = LossFunctionRegistry.build("grpo", family="policy")
    assert "clipped_sequences" not in loss(*random_data("policy").build(loss))[1]


# Layers


class Layered(nn.Module):
    """Embeddings, a tower and a decoder whose layers have one name, a norm and a head."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
        self.model = nn.ModuleDict(
            {
                "embed": nn.Embedding(3, 2),
                "layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})]),
                "norm": nn.LayerNorm(2),
            }
        )
        self.projector = nn.Sequential(nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(2, 3, bias=False) if head else None

    def get_input_embeddings(self) -> nn.Module:
        return self.model["embed"]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head


@pytest.mark.parametrize("head", [True, False])
def test_layers_are_told_apart(head: bool) -> None:
    model = Layered(head)
    found = name_layers(model, [name for name, _ in model.named_parameters()])
    layers = {"scale", "tower.layers.0", "embedding", "model.layers.0", "norm", "projector.0"}
    assert set(found.values()) == layers | ({"head"} if head else set())
    assert found["model.layers.0.experts.0.bias"] == "model.layers.0" and found["model.norm.bias"] == "norm"


def test_adapters_and_saved_modules_count_for_what_they_sit_in() -> None:
    names = ["m.norm.modules_to_save.default.weight", "m.gate.lora_A.default.weight", "m.layers.3.q.lora_B.x.weight"]
    assert list(name_layers(nn.Module(), names).values()) == ["norm", "gate", "layers.3"]


def test_sharded_parameters_are_refused() -> None:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = nn.Linear(2, 2)
        parallelize_module(model, init_device_mesh("cpu", (1,)), ColwiseParallel())
        monitor = GradientMonitorCallback(every=1, layers=True)
        monitor.attach(two(), Run(two()), print)
        with pytest.raises(LossConfigError, match="found 2 sharded parameters, such as 'weight'"):
            monitor.on_train_begin(SimpleNamespace(optim="sgd"), TrainerState(max_steps=1), None, model=model)
    finally:
        distributed.destroy_process_group()


def test_norms_of_layers_by_hand() -> None:
    model = Layered()
    model.projector.requires_grad_(False)
    model.model["norm"].weight.grad = torch.tensor([3.0, 0.0])
    model.model["norm"].bias.grad = torch.tensor([0.0, 4.0])
    model.lm_head.to(torch.float16).weight.grad = torch.full((3, 2), 300.0, dtype=torch.float16)
    found = layer_norms(model, torch.device("cpu"))
    assert found["norm"] == 5 and float(found["head"]) == pytest.approx(300 * math.sqrt(6), rel=1e-6)
    assert found["embedding"] == 0 and "projector.0" not in found
    model.zero_grad()
    with pytest.raises(RuntimeError, match="none of the 9 trained ones has any"):
        layer_norms(model, torch.device("cpu"))


@pytest.mark.parametrize(
    "launcher, optimizer, found", [("DEEPSPEED", "adamw", "DEEPSPEED"), ("FSDP", "sgd", "FSDP"), ("NO", "lomo", "lomo")]
)
def test_layers_are_refused_where_gradients_are_not_whole(launcher: str, optimizer: str, found: str) -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=launcher))
    monitor = GradientMonitorCallback(every=1, layers=True)
    monitor.attach(two(), accelerator, print)
    with pytest.raises(LossConfigError, match=f"needs whole gradients .* found .*{found}"):
        monitor.on_train_begin(SimpleNamespace(optim=optimizer), TrainerState(max_steps=1), None, model=Layered())
