"""The launcher files: accepted by accelerate and DeepSpeed, and started on two processes as their headers say."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from trl_custom_losses import CustomDPOConfig

from . import tiny

ROOT = Path(__file__).parents[1]
ACCELERATE = sorted(ROOT.glob("recipes/accelerate/*.yaml"))
DEEPSPEED = sorted(ROOT.glob("recipes/deepspeed/*.json"))
KINDS = {
    "ddp": {"type": "MULTI_CPU"},
    "fsdp2": {"type": "FSDP", "version": 2},
    "zero2": {"type": "DEEPSPEED", "stage": 2, "offload": "none", "accumulation": 2, "clipping": 0.5},
    "zero3": {"type": "DEEPSPEED", "stage": 3, "offload": "none", "accumulation": 2, "clipping": 0.5},
    "zero3_offload": {"type": "DEEPSPEED", "stage": 3, "offload": "cpu", "accumulation": 2, "clipping": 0.5},
}


def compiled(extension: str) -> bool:
    """Whether DeepSpeed's C++ extension has been compiled on this machine, which takes minutes."""
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    return any(cache.rglob(f"{extension}.so"))


def documented(file: Path) -> tuple[dict[str, str], list[str]]:
    """The environment and the words of the command for two CPU processes in a file's header."""
    text = file.read_text().partition("On two CPU processes")[2]
    lines = re.findall(r"^#   (.*)$", text, re.MULTILINE)
    words = shlex.split(" ".join(line.strip().removesuffix("\\") for line in lines))
    start = words.index("accelerate")
    return dict(word.split("=") for word in words[:start]), words[start:]


def test_there_are_the_launchers_that_the_readme_names():
    assert [path.stem for path in ACCELERATE] == sorted(KINDS)
    assert [path.stem for path in DEEPSPEED] == ["zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_takes_the_file(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "bf16" and not config.use_cpu
    words = ["--config_file", str(file), "--num_processes", "4", "scripts/train_dpo.py", "--config", "RECIPE"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == 4 and arguments.mixed_precision == "bf16"
    chosen = {"ddp": arguments.multi_gpu, "fsdp2": arguments.use_fsdp}.get(file.stem, arguments.use_deepspeed)
    assert chosen is True
    known = set(vars(launch_command_parser().parse_args(["x"])))
    settings = yaml.safe_load(file.read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(settings.get(section, {})) <= known


def test_the_fsdp_file_makes_the_plugin_that_it_describes(monkeypatch):
    file = str(ROOT / "recipes/accelerate/fsdp2.yaml")
    words = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0", "x.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


@pytest.mark.parametrize("file", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_takes_the_file_after_the_trainer_filled_it(file, run_arguments, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    training = CustomDPOConfig(**{**run_arguments, **options}, loss_function="sigmoid")
    filled = HfTrainerDeepSpeedConfig(json.loads(file.read_text()))
    filled.trainer_config_process(training)
    model = type("Model", (), {"config": type("Config", (), {"hidden_size": 64})})
    filled.trainer_config_finalize(training, model, num_training_steps=10)
    assert "auto" not in json.dumps(filled.config)
    config = DeepSpeedConfig(filled.config)
    assert config.zero_optimization_stage == int(file.stem[4])
    assert (config.zero_config.offload_optimizer is not None) == ("offload" in file.stem)
    assert config.train_micro_batch_size_per_gpu == 3 and config.gradient_accumulation_steps == 2
    assert config.gradient_clipping == 0.5 and not config.float16_config.enabled


def run(command: list[str], family: str, folder: Path, model: Path, environment: dict[str, str]) -> list[dict]:
    """Run a training script's command with tiny data added; returns what each rank reported."""
    data = tiny.preference_data(16) if family == "dpo" else tiny.prompt_data(16)
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in data))
    probe = "tests.launch_probe:Probed" + {"dpo": "Sigmoid", "grpo": "GRPO"}[family]
    words = ["--model_name_or_path", str(model), "--dataset_name", str(folder / "data.jsonl"), "--max_steps", "2"]
    words += ["--loss_function", probe, "--output_dir", str(folder / "out"), "--report_to", "none"]
    words += ["--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--per_device_train_batch_size", "2"]
    words += ["--disable_tqdm", "true", "--logging_steps", "1", "--save_strategy", "no", "--use_peft", "false"]
    if family == "grpo":
        words += ["--reward_funcs", "tests.tiny.count_reward", "--num_generations", "4", "--max_completion_length", "8"]
    environment = {"OMP_NUM_THREADS": "1", "LAUNCH_PROBE": str(folder), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [*command, *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    losses = [float(found) for found in re.findall(r"'loss': '?([-+.\de]+)", done.stdout)]
    assert len(losses) == 2
    assert (folder / "out" / "model.safetensors").exists()
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, family",
    [("ddp", "dpo"), ("fsdp2", "dpo"), ("zero2", "dpo"), ("zero3", "grpo"), ("zero3_offload", "dpo")],
)
def test_the_documented_command_trains_on_two_processes(name, family, tmp_path, dense_model):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    if name == "zero3_offload" and not compiled("cpu_adam"):
        pytest.skip("DeepSpeed's cpu_adam would have to be compiled for minutes: run the file's command once by hand")
    environment, words = documented(ROOT / "recipes" / "accelerate" / f"{name}.yaml")
    recipe = {"dpo": "dpo/composed", "grpo": "grpo/dr_grpo"}[family] + "_smollm2-135m_lora.yaml"
    words = [word.replace("train_dpo", f"train_{family}").replace("RECIPE", f"recipes/{recipe}") for word in words]
    assert words[:2] == ["accelerate", "launch"]
    program = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    found = run([*program, *words[2:]], family, tmp_path, dense_model, environment)
    assert found == [{"world": 2, **KINDS[name]}] * 2


@pytest.mark.distributed
def test_the_deepspeed_launcher_trains_on_two_processes(tmp_path, dense_model):
    pytest.importorskip("deepspeed")
    program = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29617"]
    words = ["scripts/train_dpo.py", "--config", "recipes/dpo/composed_smollm2-135m_lora.yaml", "--use_cpu", "true"]
    words += ["--bf16", "false", "--dtype", "float32", "--deepspeed", "recipes/deepspeed/zero3.json"]
    found = run([*program, *words], "dpo", tmp_path, dense_model, {"DS_ACCELERATOR": "cpu"})
    assert found == [{"world": 2, **KINDS["zero3"]}] * 2
