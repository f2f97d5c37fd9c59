"""The callback that draws a run at its end, in real runs and with stand-ins for the trackers."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests import tiny
from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    CustomGRPOConfig,
    CustomGRPOTrainer,
    NonFiniteLossError,
    plotting,
)
from trl_custom_losses.callbacks import RunReportCallback, run_report

from .runs import composed_log

SHORT = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
LOSS = {"type": "composed", "components": [{"type": "sigmoid"}, {"type": "sft", "weight": 0.5}]}


def _finish(
    callback: RunReportCallback, folder: Path, *, entries: list | None = None, report_to: Any = (), main: bool = True
) -> TrainerState:
    """Tell the callback what a Trainer tells it at the end."""
    arguments = SimpleNamespace(output_dir=str(folder), report_to=list(report_to))
    entries = SHORT if entries is None else entries
    state = TrainerState(global_step=6, max_steps=6, log_history=entries, is_world_process_zero=main)
    control = TrainerControl()
    callback.on_train_begin(arguments, state, control)
    callback.on_log(arguments, state, control, logs={"loss": 1.0})
    assert not folder.exists()
    callback.on_log(arguments, state, control, logs={"train_runtime": 1.0})
    callback.on_train_end(arguments, state, control)
    return state


# Real runs


def test_a_run_without_checkpoints_leaves_a_report(dense_model: Path, run_arguments: dict) -> None:
    folder = Path(run_arguments["output_dir"])
    trainer = CustomDPOTrainer(
        tiny.load_model(dense_model, seed=1),
        args=CustomDPOConfig(**run_arguments, max_steps=2, per_device_train_batch_size=4),
        loss_function=LOSS,
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
        callbacks=[RunReportCallback()],
    )
    trainer.train()
    content = (folder / "report" / "report.html").read_text()
    assert "sigmoid: f_divergence_type" in content and "sft: no hyperparameters" in content
    names = {path.stem for path in (folder / "report").glob("*.png")}
    assert {"loss", "components", "weights", "margins", "rewards", "drift", "optimisation"} <= names
    state = json.loads((folder / "report" / "trainer_state.json").read_text())
    assert [entry["sft_loss"] for entry in state["log_history"] if "sft_loss" in entry] == [
        entry["sft_loss"] for entry in trainer.state.log_history if "sft_loss" in entry
    ]
    assert "train_runtime" in state["log_history"][-1]
    again = plotting.plot_run(folder)  # from what the callback wrote
    assert {path.stem for path in again.pictures} == names


def test_grpo_has_rewards_and_completions(dense_model: Path, run_arguments: dict, tmp_path: Path) -> None:
    config = CustomGRPOConfig(
        **run_arguments,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        beta=0.1,
        loss_function="dapo",
    )
    CustomGRPOTrainer(
        tiny.load_model(dense_model),
        reward_funcs=[tiny.count_reward, tiny.length_reward],
        args=config,
        train_dataset=tiny.prompt_data(),
        processing_class=tiny.tokenizer(),
        callbacks=[RunReportCallback(tmp_path / "elsewhere", title="<mine>")],
    ).train()
    names = {path.stem for path in (tmp_path / "elsewhere").glob("*.png")}
    assert {"loss", "reward", "completions", "drift", "optimisation"} <= names
    assert "<h1>&lt;mine&gt;</h1>" in (tmp_path / "elsewhere" / "report.html").read_text()


class _End(TrainerCallback):
    """Ends a run at its second step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NonFiniteLossError("the loss <is> inf")])
@pytest.mark.parametrize("drawing_fails", [False, True])
def test_a_run_that_an_exception_ends_is_drawn_and_the_exception_goes_on(
    error: BaseException,
    drawing_fails: bool,
    dense_model: Path,
    run_arguments: dict,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if drawing_fails:  # someone is in a hurry

        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt("second")

        monkeypatch.setattr(plotting, "draw_report", interrupt)
    trainer = CustomDPOTrainer(
        tiny.load_model(dense_model, seed=1),
        args=CustomDPOConfig(**run_arguments, max_steps=3, per_device_train_batch_size=4),
        loss_function=LOSS,
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
        callbacks=[RunReportCallback(), _End(error)],
    )
    with pytest.raises(type(error)) as raised, caplog.at_level(logging.WARNING):
        trainer.train()
    assert raised.value is error
    page = Path(run_arguments["output_dir"]) / "report" / "report.html"
    assert page.exists() is not drawing_fails
    assert ("the report of the run was not drawn: KeyboardInterrupt" in caplog.text) is drawing_fails
    if not drawing_fails:
        content = page.read_text()
        assert "<dd>1 of 3</dd>" in content and "Which component drives the loss" in content
        found = re.search(r"<dt>Ended by</dt><dd>(.*?)</dd>", content)[1]
        assert found == {"KeyboardInterrupt": "KeyboardInterrupt"}.get(
            type(error).__name__, "NonFiniteLossError: the loss &lt;is&gt; inf"
        )


def test_a_run_that_logged_nothing_before_its_end_has_no_report(tmp_path: Path) -> None:
    arguments = SimpleNamespace(output_dir=str(tmp_path / "run"), report_to=[])
    RunReportCallback().on_abort(arguments, TrainerState(), ValueError())
    assert not (tmp_path / "run").exists()


# One report, by one process


def test_it_draws_once_while_trackers_still_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(run_report, "_TRACKERS", {"wandb": lambda pictures, args, state: seen.append("wandb")})
    monkeypatch.setattr(
        RunReportCallback, "on_train_end", _preceded(RunReportCallback.on_train_end, lambda: seen.append("end"))
    )
    _finish(RunReportCallback(), tmp_path / "run", report_to=["wandb", "mlflow"])
    assert seen == ["wandb", "end"]
    assert "mlflow" not in caplog.text  # it is no tracker of pictures
    assert (tmp_path / "run" / "report" / "report.html").exists()


def _preceded(method: Any, then: Any) -> Any:
    """`method`, with `then` called first, so that what the method adds comes behind it."""

    def called(*args: Any, **kwargs: Any) -> None:
        then()
        method(*args, **kwargs)

    return called


def test_a_trainer_that_logs_no_summary_gets_its_report_at_the_end(tmp_path: Path) -> None:
    arguments = SimpleNamespace(output_dir=str(tmp_path), report_to=[])
    state = TrainerState(global_step=6, log_history=SHORT)
    RunReportCallback().on_train_end(arguments, state, TrainerControl())
    assert (tmp_path / "report" / "report.html").exists()


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    _finish(RunReportCallback(), tmp_path / "run", main=False)
    assert not (tmp_path / "run").exists()


def test_a_second_run_of_the_same_length_is_drawn_again(tmp_path: Path) -> None:
    callback, control = RunReportCallback(), TrainerControl()
    _finish(callback, tmp_path / "one")
    arguments = SimpleNamespace(output_dir=str(tmp_path / "two"), report_to=[])
    state = TrainerState(global_step=6, log_history=SHORT)
    callback.on_train_begin(arguments, state, control)
    callback.on_train_end(arguments, state, control)
    assert (tmp_path / "two" / "report" / "report.html").exists()


# A trained run survives


def test_a_failure_while_drawing_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(plotting, "draw_report", fail)
    with caplog.at_level(logging.WARNING):
        _finish(RunReportCallback(), tmp_path / "run")
    assert [record.getMessage() for record in caplog.records] == [
        "the report of the run was not drawn: RuntimeError: no ink"
    ]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        _finish(RunReportCallback(tmp_path / "file" / "report"), tmp_path / "run")
    assert "the report of the run was not drawn" in caplog.text


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_there_is_one_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("wandb", "trackio", "torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING):
        _finish(RunReportCallback(), tmp_path / "run", report_to=[name])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the report's pictures are not in {name}: ")
    assert (tmp_path / "run" / "report" / "report.html").exists()


def test_missing_matplotlib_is_told_when_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_report, "find_spec", lambda name: None if name == "matplotlib" else object())
    with caplog.at_level(logging.WARNING):
        RunReportCallback().on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl())
    assert "will draw nothing: matplotlib is missing; pip install 'trl-custom-losses[plot]'" in caplog.text


# Trackers


class _Image:
    def __init__(self, value: str, caption: str) -> None:
        assert imread(value).shape[1] > 1000
        self.value, self.caption = value, caption


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_pictures_go_to_the_open_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict] = []
    module = ModuleType(name)
    module.Image, module.log, module.run = _Image, logged.append, object()
    monkeypatch.setitem(sys.modules, name, module)
    _finish(RunReportCallback(), tmp_path / "run", report_to=[name], entries=composed_log())
    (entry,) = logged
    assert entry.pop("train/global_step") == 6
    assert list(entry) == [f"report/{part}" for part in ("loss", "components", "weights", "margins", "optimisation")]
    assert entry["report/components"].caption == "Which component drives the loss"


def test_wandb_without_a_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType("wandb")
    module.run = None
    monkeypatch.setitem(sys.modules, "wandb", module)
    _finish(RunReportCallback(), tmp_path / "run", report_to=["wandb"])
    assert "not in wandb: RuntimeError: no run is open" in caplog.text


class _Writer:
    made: list[_Writer] = []

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.images, self.closed = log_dir, {}, False
        self.made.append(self)

    def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and image.shape[2] == 3
        self.images[tag] = step

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("where", ["newest", "variable", "none"])
def test_tensorboard_gets_an_event_file_beside_the_runs(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = _Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(_Writer, "made", [])
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    callback, expected = RunReportCallback(), tmp_path / "runs" / "report"
    if where == "newest":
        expected = tmp_path / "runs" / "today"
        expected.mkdir(parents=True)
        (expected / "events.out.tfevents.1").write_text("")
    elif where == "variable":
        expected = tmp_path / "given"
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(expected))
    arguments = SimpleNamespace(output_dir=str(tmp_path), report_to=["tensorboard"])
    callback.on_train_end(arguments, TrainerState(global_step=6, log_history=SHORT), TrainerControl())
    (writer,) = _Writer.made
    assert Path(writer.log_dir) == expected and writer.closed
    assert writer.images == {"report/loss": 6}


def test_it_is_a_callback_of_the_trainer() -> None:
    assert issubclass(RunReportCallback, TrainerCallback)
    assert TrainingArguments(output_dir="x", report_to="none", use_cpu=True).report_to == []
