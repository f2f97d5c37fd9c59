"""`dpo` and `grpo`: the training scripts as commands, and a loss from its first line to its first steps."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from trl_custom_losses import LossFunctionRegistry

from .. import tiny
from ..test_scripts import ON_CPU, write_rows
from .running import ROOT, Done, launch, run

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


def ended(*words: str | Path) -> Done:
    """How the command ended, without transformers' warnings of its own fields."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*words)


@pytest.fixture
def files(workshop: Path) -> Path:
    """Where files for `--config` are, each with a mistake."""
    for name, text in (
        ("misspelt", "loss_functoin: ipo\n"),
        ("foreign", "zzzzzzzz: 1\n"),
        ("number", "1: 2\n"),
        ("sequence", "- learning_rate\n"),
        ("malformed", "learning_rate: [1,\n"),
        ("value", "eval_strategy: never\n"),
    ):
        (workshop / f"{name}.yaml").write_text(text)
    return workshop


@pytest.mark.parametrize("command", ["dpo", "grpo"])
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "no arguments; give at least --config FILE.yaml"),
        (["--config"], 2, "--config needs a file; all arguments: trl-custom-losses {command} --help"),
        (["--learning_rate", "abc"], 2, "argument --learning_rate/--learning-rate: invalid float value: 'abc'"),
        (["--config", "nofile.yaml"], 1, "`--config` nofile.yaml: there is no such file"),
        (["--config=nofile.yaml"], 1, "`--config` nofile.yaml: there is no such file"),
        (["--config", "."], 1, "`--config` .: [Errno 21]"),
        (
            ["--config", "misspelt.yaml"],
            1,
            "`--config` misspelt.yaml: unknown key 'loss_functoin' (did you mean 'loss_f",
        ),
        (["--config", "foreign.yaml"], 1, "`--config` foreign.yaml: unknown key 'zzzzzzzz'"),
        (["--config", "number.yaml"], 1, "`--config` number.yaml: unknown key 1"),
        (["--config", "sequence.yaml"], 1, "`--config` sequence.yaml: expected keys with values, found list"),
        (["--config", "malformed.yaml"], 1, "the file given as `--config` is not plain YAML: while parsing"),
        (["--config", "value.yaml"], 1, "never is not a valid IntervalStrategy"),
        # In each of these the value in the file is refused too, as bf16 is on a machine without a GPU.
        (["--config", "value.yaml", "--loss_function", "nope"], 1, "there is no loss named 'nope'"),
        (["--config", "value.yaml", "--loss_function", '{"type": 1}'], 1, "`loss_function.type` is a name, found 1"),
        (["--config", "value.yaml", "--loss_functon", "ipo"], 1, "unknown argument 'loss_functon'"),
    ],
)
def test_the_users_own_mistake_is_the_one_line(
    command: str, words: list[str], code: int, message: str, files: Path
) -> None:
    done = ended(command, *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error: {message.replace('{command}', command)}"), done.err
    assert done.err.count("\n") == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bf16 is there")
def test_without_a_gpu_it_says_how_to_train_without(tmp_path: Path) -> None:
    done = ended("dpo", "--output_dir", tmp_path, "--loss_function", "ipo")
    assert done.code == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert "bf16" in done.err and done.err.endswith(": --bf16 false --use_cpu true\n")


@pytest.mark.parametrize("family", ["dpo", "grpo"])
def test_the_scripts_end_in_the_same_line(family: str, files: Path) -> None:
    program = (ROOT / "scripts" / f"train_{family}.py").read_text()
    done = launch("--config", "malformed.yaml", cwd=files, program=program)
    assert done.code == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: the file given as `--config` is not plain YAML: while parsing")


@pytest.mark.parametrize("name", LossFunctionRegistry.names())
def test_another_mistake_is_not_blamed_on_a_loss_that_builds(name: str, files: Path) -> None:
    config = {"type": name, **LossFunctionRegistry.get(name).example}
    (files / "loss.yaml").write_text(json.dumps({"loss_function": config, "eval_strategy": "never"}))
    command = "grpo" if LossFunctionRegistry.get(name).family == "policy" else "dpo"
    assert ended(command, "--config", "loss.yaml").err.startswith("error: never is not a valid IntervalStrategy")


def test_nor_on_one_that_takes_a_value_from_the_config(files: Path) -> None:
    done = ended("grpo", "--config", "value.yaml", "--loss_function", "dr_grpo")  # it needs `max_completion_length`
    assert done.err.startswith("error: never is not a valid IntervalStrategy")


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
