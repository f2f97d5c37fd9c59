"""The training scripts: arguments are read, data and rewards found, and mistakes end in one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import ScriptArguments

from trl_custom_losses import CustomDPOConfig, LossConfigError
from trl_custom_losses.trainers import launch

from . import tiny

ROOT = Path(__file__).parents[1]
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to", "none", "--disable_tqdm", "true"]


def write_rows(path: Path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_yaml_of_trl_works_with_one_key_added(tmp_path, dense_model):
    config = {"learning_rate": 1e-3, "beta": 0.3, "per_device_train_batch_size": 2, "loss_function": "hinge"}
    path = tmp_path / "trl.yaml"
    path.write_text(yaml.safe_dump(config))
    data = write_rows(tmp_path / "data.jsonl", tiny.preference_data())
    words = ["--config", str(path), "--model_name_or_path", str(dense_model), *ON_CPU, "--max_steps", "1"]
    trainer = launch.train_dpo([*words, "--dataset_name", data, "--output_dir", str(tmp_path / "out")])
    assert trainer.loss_function.beta == 0.3


def test_a_loss_is_given_on_the_command_line_as_a_name_or_as_json(tmp_path):
    for text, expected in [("hinge", "hinge"), ('{"type": "hinge", "beta": 0.3}', {"type": "hinge", "beta": 0.3})]:
        words = ["--loss_function", text, "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
        words += ["--model_name_or_path", "x"]
        _, training, *_ = launch.parse(words, ScriptArguments, CustomDPOConfig)
        assert training.loss_function == expected


def test_data_is_read_from_a_file_a_folder_and_a_saved_data_set(tmp_path):
    rows = tiny.preference_data(4)
    mixture = launch.DatasetMixtureConfig()
    (tmp_path / "folder").mkdir()
    rows.save_to_disk(str(tmp_path / "saved"))
    write_rows(tmp_path / "folder" / "train.jsonl", rows)
    for name in ("folder/train.jsonl", "folder", "saved"):
        loaded = launch.load_data(ScriptArguments(dataset_name=str(tmp_path / name)), mixture)
        assert len(loaded["train"]) == 4
    with pytest.raises(LossConfigError, match="no data"):
        launch.load_data(ScriptArguments(), mixture)


def test_rewards_are_found_by_name_and_import_path():
    assert launch.load_reward("tests.tiny.count_reward") is tiny.count_reward
    assert launch.load_reward("tests.tiny:count_reward") is tiny.count_reward
    assert callable(launch.load_reward("think_format_reward"))
    for wrong in ("accuracy_rewrd", "tests.tiny.missing", "no_such_package.reward"):
        with pytest.raises(LossConfigError, match=wrong):
            launch.load_reward(wrong)


def test_a_misspelt_argument_is_an_error_and_a_foreign_one_a_warning(tmp_path, caplog):
    words = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path), "--model_name_or_path", "x"]
    with pytest.raises(LossConfigError, match="loss_function"):
        launch.parse([*words, "--loss_functon", "hinge"], ScriptArguments, CustomDPOConfig)
    launch.parse([*words, "--some_launcher_option", "1"], ScriptArguments, CustomDPOConfig)
    assert "some_launcher_option" in caplog.text


@pytest.mark.parametrize("family", ["dpo", "grpo"])
def test_a_mistake_ends_the_program_with_one_line(family, tmp_path):
    words = ["--loss_function", "no_such_loss", "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"train_{family}.py"), *words, "--model_name_or_path", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "there is no loss named 'no_such_loss'" in run.stderr


def test_fsdp_that_accelerate_would_drop_without_a_word_is_an_error(tmp_path, dense_model, monkeypatch):
    data = write_rows(tmp_path / "data.jsonl", tiny.preference_data())
    words = ["--model_name_or_path", str(dense_model), *ON_CPU, "--max_steps", "1", "--loss_function", "hinge"]
    words += ["--dataset_name", data, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LossConfigError, match="asks for FSDP, but accelerate chose NO"):
        launch.train_dpo(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.yaml", "--bf16", "false"], "unexpected word 'run.yaml'; did you mean --config run.yaml"),
        (["stray"], "stray"),
    ],
)
def test_a_word_that_belongs_to_no_argument_is_an_error(words, message):
    with pytest.raises(LossConfigError, match=message):
        launch.parse(words, ScriptArguments, CustomDPOConfig)


def test_two_files_of_arguments_are_an_error(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("{}")
    with pytest.raises(SystemExit):
        launch.parse(["--config", str(tmp_path / "a.yaml")] * 2, ScriptArguments, CustomDPOConfig)
    assert "--config is given twice" in capsys.readouterr().err


_LAST_STATEMENT = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor
import torch.distributed as distributed
from trl_custom_losses.trainers.launch import end_rank

class NeverTornDown:
    def __del__(self):
        print("torn down")

kept = NeverTornDown()
if sys.argv[1] == "several":
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
atexit.register(print, "at exit")
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.3), print("uploaded")))
end_rank()
print("after")
"""


@pytest.mark.parametrize(
    ("processes", "printed"),
    [("several", ["uploaded", "at exit"]), ("one", ["after", "uploaded", "at exit", "torn down"])],
)
def test_one_of_several_processes_ends_before_its_interpreter_is_torn_down(processes, printed):
    words = [sys.executable, "-c", _LAST_STATEMENT, processes]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines() == printed
