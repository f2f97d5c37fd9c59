"""Losses with state: it follows the mode, is saved with checkpoints and continues exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests import tiny
from trl_custom_losses import CheckpointError, CustomDPOConfig, CustomDPOTrainer, LossConfigError
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.trainers.config import build_loss


class Averaging(SigmoidLoss):
    """DPO around a running mean of the margin, kept in a buffer and moved in training only."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, batch, model_outputs):
        margin = self.margin(model_outputs)
        if self.training:
            self.mean.mul_(0.5).add_(0.5 * margin.detach().mean())
        return -nn.functional.logsigmoid(margin - self.mean), {"running_mean": self.mean.clone()}


def trainer(model: Path, arguments: dict, **options) -> CustomDPOTrainer:
    return CustomDPOTrainer(
        model=tiny.load_model(model),
        args=CustomDPOConfig(**{**arguments, "per_device_train_batch_size": 2, "max_steps": 4, **options}),
        train_dataset=tiny.preference_data(),
        eval_dataset=tiny.preference_data(4),
        processing_class=tiny.tokenizer(),
        loss_function=Averaging(beta=1.0),
    )


def test_a_resumed_run_continues_the_state_bit_for_bit(dense_model, run_arguments):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(dense_model, run_arguments, **saving)
    whole.train()
    folder = Path(run_arguments["output_dir"]) / "checkpoint-2"
    assert sorted(path.name for path in folder.glob("*loss_function*")) == ["loss_function.safetensors"]
    resumed = trainer(dense_model, run_arguments, **saving)
    resumed.train(resume_from_checkpoint=str(folder))
    assert torch.equal(resumed.loss_function.mean, whole.loss_function.mean)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_without_the_state_is_an_error(dense_model, run_arguments):
    trainer(dense_model, run_arguments, save_strategy="steps", save_steps=2).train()
    folder = Path(run_arguments["output_dir"]) / "checkpoint-2"
    (folder / "loss_function.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"loss_function\.safetensors is missing"):
        trainer(dense_model, run_arguments).train(resume_from_checkpoint=str(folder))
    (folder / "checkpoint_files.json").unlink()  # as another program would have left it
    with pytest.raises(CheckpointError, match=r"has state, but the checkpoint lacks .*loss_function\.safetensors"):
        trainer(dense_model, run_arguments).train(resume_from_checkpoint=str(folder))


def test_evaluation_does_not_move_the_state(dense_model, run_arguments):
    quiet, evaluated = trainer(dense_model, run_arguments), trainer(dense_model, run_arguments, eval_strategy="steps")
    evaluated.args.eval_steps = 1
    for run in (quiet, evaluated):
        run.train()
    assert any("eval_running_mean" in entry for entry in evaluated.state.log_history)
    assert torch.equal(quiet.loss_function.mean, evaluated.loss_function.mean)


class Learned(SigmoidLoss):
    """DPO times a learned factor, which wants to be small."""

    def __init__(self, *, learning_rate: float | None = None, **options) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))
        self.learning_rate = learning_rate

    def forward(self, batch, model_outputs):
        return -self.scale * nn.functional.logsigmoid(self.margin(model_outputs)), {"scale": self.scale.detach()}


def learning(model: Path, arguments: dict, *, learning_rate: float | None, **options) -> CustomDPOTrainer:
    return CustomDPOTrainer(
        model=tiny.load_model(model),
        args=CustomDPOConfig(**{**arguments, "per_device_train_batch_size": 2, "max_steps": 4, **options}),
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
        loss_function=Learned(beta=1.0, learning_rate=learning_rate),
    )


@pytest.mark.parametrize("own, expected", [(0.1, 0.1), (None, 1e-3)])
def test_trainable_parameters_are_trained_with_their_own_learning_rate(dense_model, run_arguments, own, expected):
    run = learning(dense_model, run_arguments, learning_rate=own, lr_scheduler_type="constant", weight_decay=0.5)
    run.train()
    group = run.optimizer.param_groups[-1]
    assert group["params"] == [run.loss_function.scale] and (group["lr"], group["weight_decay"]) == (expected, 0.0)
    # Adam moves a parameter with a steady gradient by its learning rate at every step.
    assert run.loss_function.scale.item() == pytest.approx(1 - 4 * expected, rel=1e-2)
    assert run.loss_function.scale.grad is None


def test_a_learned_parameters_gradient_is_that_of_one_step(dense_model, run_arguments):
    """With plain SGD the sum of all steps' gradients, each counted once, is what the parameter has moved by."""
    run = learning(dense_model, run_arguments, learning_rate=0.5, optim="sgd", lr_scheduler_type="constant")
    run.train()
    scales = [entry["scale"] for entry in run.state.log_history if "scale" in entry] + [run.loss_function.scale.item()]
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    for before, after, loss in zip(scales, scales[1:], losses, strict=False):
        assert before - after == pytest.approx(0.5 * loss / before, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_continues_learned_parameters_bit_for_bit(dense_model, run_arguments, accumulation):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": accumulation}
    whole = learning(dense_model, run_arguments, learning_rate=0.1, **options)
    whole.train()
    resumed = learning(dense_model, run_arguments, learning_rate=0.1, **options)
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-2"))
    assert torch.equal(resumed.loss_function.scale, whole.loss_function.scale)
    assert whole.loss_function.scale != 1
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_of_a_stopped_training_do_not_reach_the_next_one(dense_model, run_arguments):
    run = learning(dense_model, run_arguments, learning_rate=0.0, optim="sgd", max_steps=1)
    run.loss_function.scale.grad = torch.tensor(1e6)
    seen = []
    run.add_callback(GradientsSeen(run.loss_function.scale, seen))
    run.train()
    assert len(seen) == 1 and abs(seen[0]) < 100


class GradientsSeen(TrainerCallback):
    """Notes a parameter's gradient before each optimizer step."""

    def __init__(self, parameter: nn.Parameter, seen: list[float]) -> None:
        self.parameter, self.seen = parameter, seen

    def on_pre_optimizer_step(self, *args, **kwargs) -> None:
        self.seen.append(self.parameter.grad.item())


def test_a_given_scheduler_cannot_know_what_the_loss_learns(dense_model, run_arguments):
    model = tiny.load_model(dense_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {
        "model": model,
        "args": CustomDPOConfig(**run_arguments, max_steps=2),
        "train_dataset": tiny.preference_data(),
        "processing_class": tiny.tokenizer(),
        "loss_function": Learned(learning_rate=0.5),
    }
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(LossConfigError, match=r"learns scale.* scheduler knows its groups already"):
        CustomDPOTrainer(**arguments, optimizers=(optimizer, scheduler))
    run = CustomDPOTrainer(**arguments, optimizers=(optimizer, None))
    run.train()
    assert run.loss_function.scale != 1


class Random(SigmoidLoss):
    """Starts anew each time."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register_buffer("start", torch.randn(3))


def test_a_random_start_is_that_of_the_seed_and_changes_no_other_number(run_arguments):
    losses = []
    for seed, before in [(3, 0), (3, 1), (4, 0)]:
        torch.manual_seed(before)
        config = CustomDPOConfig(**{**run_arguments, "seed": seed})
        losses.append(build_loss({"type": f"{__name__}:Random"}, config))
        found = torch.randn(2)
        torch.manual_seed(before)
        assert torch.equal(found, torch.randn(2))
    assert torch.equal(losses[0].start, losses[1].start) and not torch.equal(losses[0].start, losses[2].start)


def test_a_second_training_holds_the_parameters_once(dense_model, run_arguments):
    run = learning(dense_model, run_arguments, learning_rate=0.1)
    run.train()
    run.train()
    held = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert sum(parameter is run.loss_function.scale for parameter in held) == 1


def test_tensors_that_share_memory_are_saved(dense_model, run_arguments):
    class Aliased(SigmoidLoss):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.arange(4.0))
            self.register_buffer("part", self.whole[:2])

    run = trainer(dense_model, run_arguments, save_strategy="steps", save_steps=4)
    run.loss_function = Aliased()
    run.train()
    assert (Path(run_arguments["output_dir"]) / "checkpoint-4" / "loss_function.safetensors").exists()


def test_what_a_loss_keeps_in_evaluation_mode_stays_so(dense_model, run_arguments):
    class Scoring(SigmoidLoss):
        def __init__(self) -> None:
            super().__init__()
            self.scorer = nn.Dropout(0.5).eval()
            self.modes: set[tuple[bool, bool]] = set()

        def forward(self, batch, model_outputs):
            self.modes.add((self.training, self.scorer.training))
            return super().forward(batch, model_outputs)

    run = CustomDPOTrainer(
        model=tiny.load_model(dense_model),
        args=CustomDPOConfig(**run_arguments, max_steps=1),
        train_dataset=tiny.preference_data(),
        eval_dataset=tiny.preference_data(4),
        processing_class=tiny.tokenizer(),
        loss_function=Scoring(),
    )
    run.train()
    run.evaluate()
    assert run.loss_function.modes == {(True, False), (False, False)}


def test_state_that_could_not_be_saved_is_refused(run_arguments):
    class Foreign(SigmoidLoss):
        def get_extra_state(self) -> dict:
            return {"history": [1.0]}

    with pytest.raises(LossConfigError, match="state that is no tensor"):
        CustomDPOTrainer(
            model="/nonexistent",
            args=CustomDPOConfig(**run_arguments),
            train_dataset=tiny.preference_data(),
            loss_function=Foreign(),
        )
