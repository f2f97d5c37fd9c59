"""`dpo` and `grpo`: the training scripts as commands, and a loss from its first line to its first steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .. import tiny
from ..test_scripts import ON_CPU, write_rows
from .running import launch, run

FAMILIES = {"preference": ("dpo", "target: 0.25"), "policy": ("grpo", "sharpness: 1.5")}
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"]
#: Both of the ways in which the help says that training is started.
LAUNCHERS = {"preference": (), "policy": ACCELERATE}


def training(command: str, folder: Path, model: Path) -> list[str]:
    """The words of a run of two steps on tiny data."""
    data = tiny.preference_data() if command == "dpo" else tiny.prompt_data()
    words = [command, "--model_name_or_path", str(model), *ON_CPU, "--max_steps", "2", "--logging_steps", "1"]
    words += ["--dataset_name", write_rows(folder / "data.jsonl", data), "--output_dir", str(folder / "out")]
    words += ["--learning_rate", "1.0e-3", "--per_device_train_batch_size", "4"]
    if command == "grpo":
        words += ["--reward_funcs", "tests.tiny.count_reward", "--num_generations", "4", "--max_completion_length", "8"]
    return words


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_loss_is_checked_and_trains_for_two_steps(family: str, workshop: Path, dense_model: Path) -> None:
    command, value = FAMILIES[family]
    name = f"fresh_{command}"
    written = run("new", name, "--family", family)
    assert written.code == 0
    assert run("check", f"{name}.py").code == 0
    block = re.sub(r"\w+: [\d.]+}$", f"{value}}}", written.out.splitlines()[-1].strip())
    (workshop / "recipe.yaml").write_text(f"{block}\nlearning_rate: 1.0e-2\n")
    done = launch(
        *training(command, workshop, dense_model), "--config", "recipe.yaml", cwd=workshop, launcher=LAUNCHERS[family]
    )
    assert done.code == 0, done.err[-5000:]
    assert len(re.findall(r"'loss': '?[-\d.e]+", done.out)) == 2
    assert len(re.findall(rf"'{name}_(?:margin|moved)': '?[-\d.e]+", done.out)) == 2
    assert f"{value.replace(': ', '=')} (loss_function)" in done.err  # the value of the file, not the loss's own
    assert (workshop / "out" / "model.safetensors").exists()
    trained, before = tiny.load_model(workshop / "out").state_dict(), tiny.load_model(dense_model).state_dict()
    assert any(not trained[key].equal(before[key]) for key in before)


def test_arguments_reach_the_trainer_as_they_do_from_the_script(workshop: Path, dense_model: Path) -> None:
    words = [*training("dpo", workshop, dense_model), "--save_strategy", "steps", "--save_steps", "2"]
    done = run(*words, "--loss_function", '{"type": "ipo", "beta": 0.3}')
    assert done.code == 0, done.err[-3000:]
    state = json.loads((workshop / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert f"Model saved to {workshop / 'out'}" in done.out


@pytest.mark.parametrize("command", ["dpo", "grpo"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_says_how_to_launch_and_lists_the_arguments_of_trl(command: str, option: str) -> None:
    done = run(command, option)
    assert done.code == 0
    assert f"accelerate launch --config_file recipes/accelerate/zero3.yaml -m trl_custom_losses {command} " in done.out
    assert f"deepspeed --num_gpus 8 --module trl_custom_losses {command} " in done.out
    assert f"usage: trl-custom-losses {command} " in done.out
    for argument in ("--loss_function", "--learning_rate", "--model_name_or_path", "--config"):
        assert argument in done.out
    assert ("--reward_funcs" in done.out) == (command == "grpo")


@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_mistakes_are_one_line(command: str, tmp_path: Path) -> None:
    words = [command, "--use_cpu", "true", "--bf16", "false", "--output_dir", tmp_path, "--model_name_or_path", "x"]
    for wrong, message in (
        (["--loss_functon", "hinge"], "unknown argument 'loss_functon' (did you mean 'loss_function'"),
        (["--loss_function", "no_such_loss"], "there is no loss named 'no_such_loss'"),
    ):
        done = run(*words, *wrong)
        assert done.code == 1
        assert done.err.splitlines()[-1].startswith(f"error: {message}")


def test_the_word_that_deepspeeds_launcher_adds_is_taken() -> None:
    done = run("--local_rank=1", "env", "--json")
    assert done.code == 0 and done.json["losses"] > 0
    assert "local_rank" not in run("--help").out
