"""Checkpoints are whole or not read: interrupted, damaged and missing ones, and what is deleted when."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from tests import tiny
from trl_custom_losses import CheckpointError, CustomDPOConfig, CustomDPOTrainer
from trl_custom_losses.trainers import checkpoints
from trl_custom_losses.trainers.checkpoints import MANIFEST, agree_on_checkpoint, find_checkpoint

STATEFUL = {
    "type": "dynamic_multi_objective",
    "rule": "dwa",
    "window": 1,
    "objectives": {"pref": {"type": "sigmoid"}, "sft": {"type": "sft"}},
}


def trainer(model: Path, arguments: dict, **options) -> CustomDPOTrainer:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "per_device_train_batch_size": 2}
    return CustomDPOTrainer(
        model=tiny.load_model(model, seed=1),
        args=CustomDPOConfig(**{**arguments, **saving, "loss_function": STATEFUL, **options}),
        train_dataset=tiny.preference_data(),
        eval_dataset=tiny.preference_data(4),
        processing_class=tiny.tokenizer(),
    )


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the trainer's catches it."""


def killed_while_saving(run: CustomDPOTrainer, monkeypatch: pytest.MonkeyPatch, step: int, method: str) -> None:
    """Train until a method is called within the checkpoint of a step."""
    stock = getattr(type(run), method)

    def until(self, *args, **kwargs):
        if self.state.global_step == step and self._writing_checkpoint:
            raise Killed
        return stock(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(run), method, until)
        with pytest.raises(Killed):
            run.train()


def folder(run: CustomDPOTrainer, step: int) -> Path:
    return Path(run.args.output_dir) / f"checkpoint-{step}"


def assert_equal_ends(one: CustomDPOTrainer, other: CustomDPOTrainer) -> None:
    assert one.state.global_step == other.state.global_step
    for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    state = other.loss_function.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.loss_function.state_dict().items())


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"])
@pytest.mark.parametrize("wanted", ["latest", True])
def test_a_checkpoint_that_was_being_written_is_nowhere(dense_model, run_arguments, monkeypatch, method, wanted):
    whole = trainer(dense_model, {**run_arguments, "output_dir": run_arguments["output_dir"] + "-whole"})
    whole.train()
    broken = trainer(dense_model, run_arguments)
    killed_while_saving(broken, monkeypatch, 3, method)
    left = checkpoints.staging(folder(broken, 3))
    assert (left / "model.safetensors").exists() and not folder(broken, 3).exists()
    assert get_last_checkpoint(run_arguments["output_dir"]).endswith("checkpoint-2")  # also for other programs
    assert find_checkpoint(wanted, run_arguments["output_dir"]) == str(folder(broken, 2))
    (left / "left_over.bin").touch()
    resumed = trainer(dense_model, run_arguments)
    resumed.train(resume_from_checkpoint=wanted)
    assert_equal_ends(resumed, whole)
    assert checkpoints.damage(folder(resumed, 3)) is None
    assert not (folder(resumed, 3) / "left_over.bin").exists() and not left.parent.exists()


def test_a_finished_checkpoint_lists_every_file(dense_model, run_arguments):
    run = trainer(dense_model, run_arguments)
    run.train()
    path = folder(run, 4)
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert listed == {file.name: file.stat().st_size for file in path.iterdir() if file.name != MANIFEST}
    assert {"model.safetensors", "optimizer.pt", "loss_function.safetensors", "trainer_state.json"} <= listed.keys()
    assert sorted(found.name for found in path.parent.iterdir() if found.is_dir()) == [
        f"checkpoint-{step}" for step in range(1, 5)
    ]


def killed_at_rename(number: int, monkeypatch: pytest.MonkeyPatch, save: Callable[[], None]) -> None:
    """Let a checkpoint be saved until a folder is about to be renamed for the `number`-th time."""
    rename, seen = Path.rename, []

    def until(self, target):
        seen.append(self)
        if len(seen) == number:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until)
        with pytest.raises(Killed):
            save()


@pytest.mark.parametrize("number, event", [(1, "before the old one moves"), (2, "between the two")])
def test_the_only_checkpoint_outlives_being_saved_again(dense_model, run_arguments, monkeypatch, number, event):
    """A checkpoint of the step just saved, as one that is asked for by a signal."""
    run = trainer(dense_model, run_arguments, save_total_limit=1, max_steps=2)
    run.train()
    killed_at_rename(number, monkeypatch, lambda: run._save_checkpoint(run.model, None))
    again = trainer(dense_model, run_arguments, save_total_limit=1, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert [path.name for path in Path(run_arguments["output_dir"]).glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_complete_checkpoint_that_was_not_moved_yet_is_recovered(dense_model, run_arguments, monkeypatch):
    run = trainer(dense_model, run_arguments, max_steps=2)
    run.train()
    run.state.global_step = 3
    killed_at_rename(1, monkeypatch, lambda: run._save_checkpoint(run.model, None))
    assert not folder(run, 3).exists()
    agree_on_checkpoint(None, run_arguments["output_dir"], run.accelerator)
    assert checkpoints.damage(folder(run, 3)) is None and (folder(run, 3) / MANIFEST).exists()


def test_what_is_pushed_is_in_its_place(dense_model, run_arguments, monkeypatch):
    run = trainer(dense_model, run_arguments, max_steps=2)
    run.args.push_to_hub, pushed = True, []

    def push(self, path: str) -> None:
        pushed.append((path, sorted(found.name for found in Path(path).iterdir())))

    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    monkeypatch.setattr("transformers.Trainer._finish_current_push", lambda self: None)
    run.train()
    assert [path for path, _ in pushed] == [str(folder(run, step)) for step in (1, 2)]
    assert all(MANIFEST in files for _, files in pushed)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "loss_function.safetensors"]
)
def test_a_truncated_file_is_named_and_an_older_checkpoint_taken_only_if_asked(
    dense_model, run_arguments, caplog, name
):
    whole = trainer(dense_model, run_arguments)
    whole.train()
    damaged = folder(whole, 4) / name
    damaged.write_bytes(damaged.read_bytes()[:-7])
    size = damaged.stat().st_size
    for wanted in ("latest", True, str(folder(whole, 4))):
        with pytest.raises(CheckpointError, match=rf"{name} has {size} bytes, {size + 7} were written.*latest_intact"):
            trainer(dense_model, run_arguments).train(resume_from_checkpoint=wanted)
    resumed = trainer(dense_model, run_arguments)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint="latest_intact")
    assert f"{name} has {size} bytes" in caplog.text and "passed over" in caplog.text
    assert_equal_ends(resumed, whole)


def test_a_missing_file_and_a_damaged_list_are_named(dense_model, run_arguments):
    run = trainer(dense_model, run_arguments)
    run.train()
    (folder(run, 4) / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        find_checkpoint("latest", run.args.output_dir)
    for content in (b'{"files": {"opt', b"\xff\xfe\xfd", b'{"files": [1]}', b"[]", b"{}"):
        (folder(run, 3) / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{MANIFEST} cannot be read"):
            find_checkpoint(folder(run, 3), run.args.output_dir)
    assert find_checkpoint("latest_intact", run.args.output_dir) == str(folder(run, 2))


def test_a_truncated_loss_state_is_named_in_a_checkpoint_without_a_list(dense_model, run_arguments):
    run = trainer(dense_model, run_arguments)
    run.train()
    (folder(run, 4) / MANIFEST).unlink()  # as in a checkpoint that another program has copied
    state = folder(run, 4) / "loss_function.safetensors"
    whole = state.read_bytes()
    for content in (whole[:-3], whole[:4], b""):
        state.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"state of the loss 'dynamic_multi_objective', .*loss_function\.safe"
        ):
            trainer(dense_model, run_arguments, max_steps=5).train(resume_from_checkpoint="latest")


def test_the_state_of_another_loss_is_refused(dense_model, run_arguments):
    trainer(dense_model, run_arguments).train()
    other = {**STATEFUL, "objectives": {**STATEFUL["objectives"], "more": {"type": "hinge"}}}
    with pytest.raises(CheckpointError, match=r"does not hold the state of the loss"):
        trainer(dense_model, run_arguments, max_steps=5, loss_function=other).train(resume_from_checkpoint="latest")


def test_without_a_checkpoint_latest_starts_anew_and_the_others_say_so(dense_model, run_arguments, tmp_path):
    run = trainer(dense_model, run_arguments, max_steps=1)
    run.train(resume_from_checkpoint="latest")
    assert run.state.global_step == 1
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        find_checkpoint(True, str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*checkpoint-9 to resume from"):
        find_checkpoint("checkpoint-9", str(tmp_path))
    assert find_checkpoint(None, "x") is find_checkpoint(False, "x") is find_checkpoint("false", "x") is None
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        find_checkpoint("True", str(tmp_path))  # a word of the command line
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*checkpoint-9"):
        find_checkpoint(tmp_path / "checkpoint-9", str(tmp_path))
    with pytest.raises(TypeError, match="must be a path, True, 'latest' or 'latest_intact'; found 7"):
        find_checkpoint(7, str(tmp_path))
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(CheckpointError, match=r"neither .* so it was not written to its end"):
        find_checkpoint("latest", str(tmp_path))


def test_a_checkpoint_without_the_optimizers_state_is_warned_of(dense_model, run_arguments, caplog):
    run = trainer(dense_model, run_arguments, save_only_model=True, max_steps=1)
    run.train()
    with caplog.at_level(logging.WARNING):
        find_checkpoint("latest", run.args.output_dir)
    assert "holds no state of the optimizer" in caplog.text


def test_the_state_of_a_loss_that_the_run_has_no_more_is_warned_of(dense_model, run_arguments, caplog):
    trainer(dense_model, run_arguments).train()
    with caplog.at_level(logging.WARNING):
        run = trainer(dense_model, run_arguments, max_steps=5, loss_function="hinge")
        run.train(resume_from_checkpoint=folder(run, 4))
    assert "is not read: the loss 'hinge' has no state" in caplog.text


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint("latest", str(tmp_path)) == str(tmp_path / "checkpoint-100")


def test_older_checkpoints_are_deleted_after_the_new_one_is_finished(dense_model, run_arguments, monkeypatch):
    broken = trainer(dense_model, run_arguments, save_total_limit=1)
    finish = checkpoints.finish

    def killed(path: Path) -> None:
        if path.name == "checkpoint-3":
            raise Killed
        finish(path)

    with monkeypatch.context() as patch:
        patch.setattr("trl_custom_losses.trainers.resumable.finish", killed)
        with pytest.raises(Killed):
            broken.train()
    assert find_checkpoint("latest", run_arguments["output_dir"]) == str(folder(broken, 2))
    resumed = trainer(dense_model, run_arguments, save_total_limit=1)
    resumed.train(resume_from_checkpoint="latest")
    assert [path.name for path in Path(run_arguments["output_dir"]).glob("checkpoint-*")] == ["checkpoint-4"]
    assert resumed.args.save_total_limit == 1
    saved = torch.load(folder(resumed, 4) / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1


def test_the_best_checkpoint_is_kept_and_loaded(dense_model, run_arguments):
    options = {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_pref_weight"}
    run = trainer(dense_model, run_arguments, eval_strategy="steps", eval_steps=1, greater_is_better=True, **options)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{run.state.best_global_step}" and best.parent == Path(run.args.output_dir)
    assert (best / MANIFEST).is_file() and checkpoints.damage(best) is None
    last = json.loads((folder(run, 4) if folder(run, 4).exists() else best).joinpath("trainer_state.json").read_text())
    assert last["best_model_checkpoint"] == str(best)


@pytest.mark.parametrize("place", ["same", "moved"])
def test_the_best_checkpoint_is_known_after_a_resume(dense_model, run_arguments, tmp_path, place):
    """Also where the output directory is now called otherwise."""
    options = {"save_total_limit": 2, "metric_for_best_model": "eval_pref_weight", "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "greater_is_better": True, "max_steps": 6}
    run = trainer(dense_model, run_arguments, **{**options, "max_steps": 3})
    run.train()
    output = Path(run_arguments["output_dir"])
    if place == "moved":
        output = output.rename(tmp_path / "elsewhere")
    again = trainer(dense_model, {**run_arguments, "output_dir": str(output)}, **options)
    again.train(resume_from_checkpoint=True)
    step = again.state.best_global_step
    assert again.state.best_model_checkpoint == str(output / f"checkpoint-{step}")
    assert {path.name for path in output.glob("checkpoint-*")} >= {f"checkpoint-{step}", "checkpoint-6"}


def test_what_is_deleted_is_never_there_in_part(dense_model, run_arguments, monkeypatch):
    run = trainer(dense_model, run_arguments, save_total_limit=1)
    removed = []
    remove = shutil.rmtree

    def noting(path, *args, **kwargs):
        removed.append(Path(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", noting)
    run.train()
    assert removed and not any(path.name.startswith("checkpoint-") for path in removed)
    assert [path.name for path in Path(run_arguments["output_dir"]).glob("checkpoint-*")] == ["checkpoint-4"]


def test_what_another_program_only_announced_makes_room(dense_model, run_arguments, monkeypatch):
    """transformers' checkpoint on SIGTERM leaves a mark where the checkpoint will be."""
    run = trainer(dense_model, run_arguments, max_steps=2)
    run.train()
    run.state.global_step = 3
    killed_at_rename(1, monkeypatch, lambda: run._save_checkpoint(run.model, None))
    folder(run, 3).mkdir()
    (folder(run, 3) / "checkpoint-is-incomplete.txt").touch()
    checkpoints.recover(Path(run_arguments["output_dir"]))
    assert checkpoints.damage(folder(run, 3)) is None


def test_a_folder_left_between_two_renames_does_not_stop_the_next_save(dense_model, run_arguments):
    run = trainer(dense_model, run_arguments, max_steps=2)
    run.train()
    left = checkpoints.staging(folder(run, 2)).with_name("replaced-checkpoint-2")
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    run._save_checkpoint(run.model, None)
    assert checkpoints.damage(folder(run, 2)) is None and not left.parent.exists()


def test_a_run_that_had_reached_its_end_takes_no_further_step(dense_model, run_arguments):
    whole = trainer(dense_model, run_arguments, max_steps=3)  # within an epoch, where the Trainer would go on
    whole.train()
    again = trainer(dense_model, run_arguments, max_steps=3)
    again.train(resume_from_checkpoint="latest")
    assert_equal_ends(again, whole)


def ranks(count: int = 2) -> SimpleNamespace:
    return SimpleNamespace(num_processes=count, is_main_process=True, wait_for_everyone=lambda: None)


def test_an_error_on_another_rank_is_an_error_here(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "gather_object", lambda mine: [*mine, (None, "rank 1: optimizer.pt is missing")])
    with pytest.raises(CheckpointError, match=r"rank 1: optimizer\.pt is missing"):
        agree_on_checkpoint("latest", str(tmp_path), ranks())


def test_ranks_that_see_different_checkpoints_are_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "gather_object", lambda mine: [*mine, ("run/checkpoint-8", None)])
    with pytest.raises(CheckpointError, match=r"rank 0: None, rank 1: run/checkpoint-8.*storage that all"):
        agree_on_checkpoint("latest", str(tmp_path), ranks())
