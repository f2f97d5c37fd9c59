"""The driver that takes a loss through a run: by hand on a recording tree, and in both trainers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests import tiny
from tests.trainers.grpo_parity import build_custom, rollout
from trl_custom_losses import (
    ComposableLossFunction,
    CustomDPOConfig,
    CustomDPOTrainer,
    Loss,
    LossFunctionRegistry,
    PolicyLoss,
    PreferenceLoss,
)
from trl_custom_losses.callbacks import LossFunctionCallback
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.testing import random_data


class Events:
    """Mixed into a loss: writes down what happens to it. `told` are the values that it observes in a micro-batch."""

    beta: float

    def record(self, told: Mapping[str, Any] | None = None, log: list | None = None, **metrics: float) -> Events:
        self.told, self.metrics = told or {}, metrics
        self.log = [] if log is None else log
        return self

    def note(self, event: str, *details: Any) -> None:
        self.log.append((self.name, event, *details))

    def on_train_begin(self, total_steps: int) -> None:
        super().on_train_begin(total_steps)
        self.note("train", total_steps)

    def on_step_begin(self, step: int) -> None:
        super().on_step_begin(step)
        self.note("begin", step, getattr(self, "beta", None))

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> Mapping[str, float] | None:
        super().on_step_end(step, observed)
        self.note("end", step, {name: value.tolist() for name, value in observed.items()})
        self.observed = observed
        return self.metrics or None

    def forward(self, batch: Any, model_outputs: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        for name, value in self.told.items():
            self.observe(name, value)
        return super().forward(batch, model_outputs)


class Leaf(Events, SigmoidLoss):
    pass


class Sum(Events, ComposableLossFunction):
    pass


class Ranks:
    """The accelerator of one of two processes, whose other one tells the same times ten."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.reduced: list[Tensor] = []

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        assert how == "sum" and tensor.dim() == 1
        self.reduced.append(tensor.clone())
        return 11 * tensor


class Run:
    """A run with the Trainer's calls."""

    def __init__(self, loss: Loss, total: int = 4) -> None:
        self.loss, self.accelerator, self.logged = loss, Ranks(), []
        self.driver = LossFunctionCallback(loss, self.accelerator, self.logged.append)
        self.state = TrainerState(max_steps=total)

    def call(self, event: str) -> None:
        args = TrainingArguments(use_cpu=True, bf16=False, report_to="none")
        getattr(self.driver, event)(args, self.state, TrainerControl(), model=None)

    def step(self, micro_batches: int = 1) -> None:
        self.call("on_step_begin")
        data = random_data("preference")
        for _ in range(micro_batches):
            self.loss(*data.build(self.loss))
        self.state.global_step += 1
        self.call("on_step_end")


def _leaf(name: str, log: list, told: Mapping[str, Any] | None = None, **options: Any) -> Leaf:
    loss = LossFunctionRegistry.build({"type": f"{__name__}:Leaf", **options})
    loss.name = name
    return loss.record(told, log)


BETA = {"schedule": "linear", "start": 1.0, "end": 2.0}


def test_events_reach_every_loss_of_a_tree_once_and_in_order() -> None:
    log: list[tuple] = []
    inner = Sum([_leaf("a", log, beta=BETA)], [1.0]).record(log=log)
    inner.name = "inner"
    outer = Sum({"inner": inner, "b": _leaf("b", log)}).record(log=log)
    outer.name = "outer"
    run = Run(outer)
    run.call("on_train_begin")
    assert log == [(name, "train", 4) for name in ("outer", "inner", "a", "b")]
    for step in range(3):
        log.clear()
        run.step(micro_batches=2)
        begun, ended = log[:4], log[4:]
        # Scheduled values are there before any `on_step_begin`.
        betas = {"outer": None, "inner": None, "a": 1 + step / 4, "b": 0.1}
        assert begun == [(name, "begin", step, betas[name]) for name in betas]
        assert ended == [(name, "end", step, {}) for name in betas]


def test_a_parent_sees_what_its_parts_were_given() -> None:
    class Parent(Sum):
        def on_step_begin(self, step: int) -> None:
            self.seen = self.losses[0].beta
            self.losses[0].beta = 7.0

    loss = Parent([_leaf("a", [], beta=BETA)]).record()
    run = Run(loss)
    run.call("on_train_begin")
    run.state.global_step = 2
    run.call("on_step_begin")
    assert loss.seen == 1.5 and loss.losses[0].beta == 7.0


def test_weights_of_compositions_follow_the_run() -> None:
    loss = Sum([_leaf("a", [])], [{"schedule": "linear", "start": 0.0, "end": 1.0}]).record()
    run = Run(loss, total=2)
    run.call("on_train_begin")
    found = []
    for _ in range(2):
        run.step()
        found.append(loss.weights["a"])
    assert found == [0.0, 0.5]


def test_a_run_that_goes_on_has_its_values_before_the_first_step() -> None:
    """`eval_on_start` evaluates between the two."""
    loss = _leaf("a", [], beta=BETA)
    run = Run(loss)
    run.state.global_step = 3
    run.call("on_train_begin")
    assert loss.beta == 1.75


# Observations


def test_observations_are_summed_over_micro_batches_and_ranks() -> None:
    told = {
        "scalar": torch.tensor(1.5),
        "matrix": torch.arange(6.0).view(2, 3),
        "whole": torch.tensor([2, 3]),
        "bool": torch.tensor([True, False, True]),
        "half": torch.tensor([0.5], dtype=torch.bfloat16),
        "with gradient": torch.ones(2, requires_grad=True) * 2,
        "empty": torch.zeros(0),
    }
    loss = _leaf("a", [], told)
    run = Run(loss)
    run.call("on_train_begin")
    for _ in range(2):  # each step starts from nothing
        run.step(micro_batches=3)
        assert set(loss.observed) == set(told)
        for name, value in told.items():
            found = loss.observed[name]
            torch.testing.assert_close(found, 11 * 3 * value.detach().double(), rtol=1e-12, atol=0)
            assert found.dtype is torch.float64 and found.device.type == "cpu" and not found.requires_grad
    assert len(run.accelerator.reduced) == 2, "one collective a step"


def test_a_tensor_that_a_loss_moves_afterwards_was_observed_as_it_was() -> None:
    class Moving(Leaf):
        def forward(self, batch: Any, model_outputs: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
            result = super().forward(batch, model_outputs)
            self.told["count"].add_(1)
            return result

    loss = Moving().record({"count": torch.tensor([1.0])})
    run = Run(loss)
    run.call("on_train_begin")
    run.step(micro_batches=3)
    assert loss.observed["count"] == 11 * (1 + 2 + 3)


def test_each_loss_gets_its_own() -> None:
    log: list[tuple] = []
    parts = [_leaf(name, log, {"n": torch.tensor(value)}) for name, value in (("a", 1.0), ("b", 2.0))]
    quiet = _leaf("c", log)
    loss = Sum([*parts, quiet]).record({"n": torch.tensor(5.0), "m": torch.ones(2)}, log)
    loss.name = "sum"
    run = Run(loss)
    run.call("on_train_begin")
    log.clear()
    run.step(micro_batches=2)
    ends = {name: details[-1] for name, event, *details in log if event == "end"}
    assert ends == {"sum": {"n": 110.0, "m": [22.0, 22.0]}, "a": {"n": 22.0}, "b": {"n": 44.0}, "c": {}}
    assert len(run.accelerator.reduced) == 1


def test_the_order_in_which_a_rank_observes_does_not_matter() -> None:
    """Ranks exchange plain numbers, so they must agree on the order."""
    first, second = (_leaf("a", [], dict(items)) for items in ([("x", torch.ones(1)), ("y", torch.zeros(2))],) * 2)
    second.told = dict(reversed(second.told.items()))
    sent = []
    for loss in (first, second):
        run = Run(loss)
        run.call("on_train_begin")
        run.step()
        sent.append(run.accelerator.reduced[0])
    assert torch.equal(*sent)


def test_compositions_that_observe_nothing_cost_no_collective() -> None:
    run = Run(ComposableLossFunction([LossFunctionRegistry.build("sigmoid"), LossFunctionRegistry.build("sft")]))
    run.call("on_train_begin")
    run.step()
    assert run.accelerator.reduced == []


def test_evaluation_is_not_observed() -> None:
    loss = _leaf("a", [], {"n": torch.ones(())})
    run = Run(loss)
    run.call("on_train_begin")
    run.call("on_step_begin")
    data = random_data("preference")
    for training in (True, False, True):
        loss.train(training)
        loss(*data.build(loss))
    loss.eval()  # as the last micro-batch before an evaluation leaves it
    run.state.global_step = 1
    run.call("on_step_end")
    assert loss.observed["n"] == 11 * 2


def test_what_a_stopped_run_left_is_forgotten() -> None:
    loss = _leaf("a", [], {"n": torch.ones(())})
    run = Run(loss)
    run.call("on_train_begin")
    run.call("on_step_begin")
    loss(*random_data("preference").build(loss))
    run.call("on_train_begin")
    run.step()
    assert loss.observed["n"] == 11


# Metrics


def test_metrics_of_a_steps_end_are_handed_on() -> None:
    parts = [_leaf(name, []) for name in ("a", "b", "c")]
    loss = Sum(parts).record()
    run = Run(loss)
    run.call("on_train_begin")
    run.step()
    assert run.logged == []
    parts[0].metrics, parts[1].metrics = {"shared": 1.0, "own": 2.0}, {"shared": 3.0}
    run.step()
    assert run.logged == [{"a/shared": 1.0, "own": 2.0, "b/shared": 3.0}]


def test_metrics_of_losses_of_one_name_are_told_apart() -> None:
    parts = {"x": _leaf("a", []), "y": _leaf("a", [])}
    parts["x"].metrics, parts["y"].metrics = {"shared": 1.0}, {"shared": 3.0}
    run = Run(Sum(parts).record())
    run.call("on_train_begin")
    run.step()
    assert len(run.logged[0]) == 2 and set(run.logged[0].values()) == {1.0, 3.0}


# In the trainers


class DPOEvents(Events, SigmoidLoss):
    pass


class Reinforce(PolicyLoss):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, batch: Any, model_outputs: Any) -> tuple[Tensor, dict]:
        return -self.beta * batch.advantages * model_outputs.per_token_logps, {}


class GRPOEvents(Events, Reinforce):
    pass


def _recording(kind: type[Events]) -> Any:
    config = {"type": f"{__name__}:{kind.__name__}", "beta": BETA}
    loss = LossFunctionRegistry.build(config)
    return loss.record({"micro_batches": torch.ones(()), "of": torch.ones(2, 2)}, end_metric=4.5)


def _dpo(model: Path, arguments: dict, **options: Any) -> CustomDPOTrainer:
    """Five micro-batches an epoch, so that every third step has one alone."""
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, **options}
    return CustomDPOTrainer(
        model=tiny.load_model(model),
        args=CustomDPOConfig(**arguments | config),
        train_dataset=tiny.preference_data(10),
        eval_dataset=tiny.preference_data(4),
        processing_class=tiny.tokenizer(),
        loss_function=_recording(DPOEvents),
    )


def _grpo(model: Path, arguments: dict, **options: Any) -> Any:
    return build_custom(
        model,
        arguments,
        loss_function=_recording(GRPOEvents),
        trainer={"rollout_func": rollout, "eval_dataset": tiny.prompt_data(4)},
        gradient_accumulation_steps=2,
        **{"max_steps": 5, **options},
    )


def _steps(loss: Events) -> list[tuple]:
    """(step, beta, micro-batches) of each optimizer step, from a log in which begin and end take turns."""
    (_, event, total), *rest = loss.log
    assert (event, total) == ("train", 5)
    begun, ended = rest[::2], rest[1::2]
    assert [event for _, event, *_ in begun] == ["begin"] * len(begun)
    assert [event for _, event, *_ in ended] == ["end"] * len(begun)
    assert [step for _, _, step, _ in begun] == [step for _, _, step, _ in ended]
    for _, _, _, observed in ended:
        assert observed["of"] == [[observed["micro_batches"]] * 2] * 2
    return [(step, beta, sums["micro_batches"]) for (_, _, step, beta), (*_, sums) in zip(begun, ended, strict=True)]


class EvaluateAlways(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = True


@pytest.mark.parametrize("make", [_dpo, _grpo])
def test_one_begin_and_one_end_for_each_optimizer_step(make: Any, dense_model: Path, run_arguments: dict) -> None:
    """Also after a resume, and with evaluations in between, one of them before the first step."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = make(dense_model, run_arguments, **saving)
    whole.train()
    counts = [2, 2, 1, 2, 2] if make is _dpo else [2] * 5
    expected = [(step, 1 + step / 5, float(count)) for step, count in enumerate(counts)]
    assert _steps(whole.loss_function) == expected
    entries = [entry for entry in whole.state.log_history if "loss" in entry]
    assert [entry["end_metric"] for entry in entries] == [4.5] * 5
    assert [entry["beta"] for entry in entries] == pytest.approx([beta for _, beta, _ in expected])

    resumed = make(dense_model, run_arguments, eval_on_start=True, per_device_eval_batch_size=4)
    resumed.add_callback(EvaluateAlways())
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-3"))
    assert _steps(resumed.loss_function) == expected[3:]
    evaluated = [entry["eval_beta"] for entry in resumed.state.log_history if "eval_beta" in entry]
    assert evaluated == pytest.approx([1.6, 1.6, 1.8]), "of the step to come, then of the last one"
    assert not any("eval_end_metric" in entry for entry in resumed.state.log_history)


class Counting(PreferenceLoss):
    """A user's loss that follows the mean of its margin with one step of lag."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, batch: Any, model_outputs: Any) -> tuple[Tensor, dict]:
        margin = model_outputs.log_ratios.chunk(2)
        margin = margin[0] - margin[1]
        self.observe("margin", torch.stack((margin.sum(), torch.tensor(float(len(margin))))))
        return (margin - 1) ** 2, {"batch_margin": margin.detach()}

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> dict[str, float]:
        total, count = observed["margin"].tolist()
        self.mean.fill_(total / count)
        return {"followed": total / count}


def test_a_users_loss_follows_the_mean_of_the_whole_step(dense_model: Path, run_arguments: dict) -> None:
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    run = CustomDPOTrainer(
        model=tiny.load_model(dense_model, seed=1),
        ref_model=tiny.load_model(dense_model),
        args=CustomDPOConfig(**run_arguments | config),
        train_dataset=tiny.preference_data(10),
        processing_class=tiny.tokenizer(),
        loss_function=Counting(),
    )
    run.train()
    entries = [entry for entry in run.state.log_history if "followed" in entry]
    assert [entry["followed"] for entry in entries] == pytest.approx([entry["batch_margin"] for entry in entries])
    assert len(entries) == 3 and run.loss_function.mean == pytest.approx(entries[-1]["followed"])


def test_ranks_that_observe_different_things_are_told() -> None:
    class Differing(Ranks):
        def reduce(self, tensor: Tensor, how: str) -> Tensor:
            other = tensor.clone()
            other[1:3] = torch.tensor([7.0, 49.0])  # another checksum
            return tensor + other

    run = Run(_leaf("a", [], {"x": torch.ones(2)}))
    run.driver.accelerator = Differing()
    run.call("on_train_begin")
    with pytest.raises(RuntimeError, match=r"ranks observed different things.*'x', \(2,\)"):
        run.step()


def test_whether_ranks_meet_does_not_depend_on_what_one_of_them_observed() -> None:
    silent, deaf = Run(_leaf("a", [])), Run(LossFunctionRegistry.build("sigmoid"))
    deaf.loss.observe("x", torch.ones(1))
    for run, meetings in ((silent, 1), (deaf, 0)):
        run.call("on_train_begin")
        run.step()
        assert len(run.accelerator.reduced) == meetings


def test_shapes_that_differ_between_micro_batches_are_refused() -> None:
    loss = _leaf("a", [])
    loss.observe("x", torch.ones(1))
    with pytest.raises(ValueError, match=r"'a' observes 'x' in the shapes \(1,\) and \(2,\)"):
        loss.observe("x", torch.ones(2))
