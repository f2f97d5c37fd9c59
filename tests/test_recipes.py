"""The recipes: every key is known, they train tiny models, and what their headers say is so."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ScriptArguments
from trl.scripts.grpo import GRPOScriptArguments

from trl_custom_losses import CustomDPOConfig, CustomGRPOConfig
from trl_custom_losses.trainers import launch

from . import tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/dpo/*.yaml")) + sorted(ROOT.glob("recipes/grpo/*.yaml"))
QWEN = [path for path in RECIPES if "qwen3" in path.stem]
TYPES = {"dpo": (ScriptArguments, CustomDPOConfig), "grpo": (GRPOScriptArguments, CustomGRPOConfig)}
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to", "none", "--disable_tqdm", "true"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def settings(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text())


def header(recipe: Path) -> str:
    """The comment before the first key."""
    return recipe.read_text().partition("model_name_or_path")[0]


def commands(recipe: Path) -> list[list[str]]:
    """The words of each command of a header."""
    lines = [line.removeprefix("#").strip() for line in header(recipe).splitlines() if line.startswith("#   ")]
    text = "\n".join(lines).replace("\\\n", " ")
    starts = ("python ", "accelerate ", "deepspeed ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(starts)]


def script_of(recipe: Path):
    """The recipe's training script, imported as a module."""
    path = ROOT / "scripts" / f"train_{recipe.parent.name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_run(recipe: Path, tmp_path: Path, model: Path) -> list[str]:
    """A recipe's command line with a tiny model, local data and two steps."""
    family, keys = recipe.parent.name, settings(recipe)
    data = tiny.preference_data() if family == "dpo" else tiny.prompt_data()
    # With these columns there, the scorer of a recipe, a large model, is not asked.
    data = data.add_column("chosen_unsafe", [0.0] * len(data)).add_column("rejected_unsafe", [1.0] * len(data))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in data))
    words = ["--config", str(recipe), "--model_name_or_path", str(model), *ON_CPU, "--max_steps", "2"]
    words += ["--dataset_name", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")]
    words += ["--gradient_accumulation_steps", "1", "--eval_strategy", "no"]
    if keys.get("load_in_4bit"):  # needs an optional package; tested apart
        words += ["--load_in_4bit", "false"]
    if family == "grpo":
        words += ["--reward_funcs", "tests.tiny.count_reward", "--max_completion_length", "8", "--use_vllm", "false"]
        generations = keys.get("num_generations", 8)
        words += ["--per_device_train_batch_size", str(generations)]
    return words


@each_recipe
def test_every_key_of_a_recipe_is_known_and_its_loss_builds(recipe):
    script, config = TYPES[recipe.parent.name]
    words = ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"]
    *_, unknown = launch.TrlParser(
        (script, config, launch.ModelConfig, launch.DatasetMixtureConfig)
    ).parse_args_and_config(words, return_remaining_strings=True)
    assert unknown == []
    _, training, *_ = launch.parse(words, script, config)
    assert training.loss_function == settings(recipe)["loss_function"]


@each_recipe
def test_a_recipe_trains_a_tiny_model_for_two_steps(recipe, tmp_path, dense_model):
    trainer = script_of(recipe).main(tiny_run(recipe, tmp_path, dense_model))
    assert trainer.state.global_step == 2
    loss = settings(recipe)["loss_function"]
    assert trainer.loss_function.name == (loss if isinstance(loss, str) else loss["type"])
    saved = "adapter_model.safetensors" if settings(recipe).get("use_peft") else "model.safetensors"
    assert (tmp_path / "out" / saved).exists()


@pytest.mark.parametrize("recipe", QWEN, ids=lambda path: path.stem)
def test_a_name_says_loss_model_and_method(recipe):
    keys = settings(recipe)
    loss, model, method = recipe.stem.rsplit("_", 2)
    assert model == keys["model_name_or_path"].split("/")[1].lower().removesuffix("-instruct")
    expected = "qlora" if keys.get("load_in_4bit") else "lora" if keys.get("use_peft") else "full"
    assert method == expected
    named = keys["loss_function"] if isinstance(keys["loss_function"], str) else keys["loss_function"]["type"]
    assert loss == named or keys["loss_function"]["balancing"]
    assert keys["output_dir"] == f"outputs/{recipe.stem}"


@each_recipe
def test_the_commands_of_a_header_name_files_that_exist_and_this_recipe(recipe):
    found = [words for words in commands(recipe) if "--config" in words]
    assert found
    for words in found:
        files = [word for word in words if word.startswith(("recipes/", "scripts/"))]
        assert all((ROOT / file).is_file() for file in files), files
        assert f"scripts/train_{recipe.parent.name}.py" in files
        assert words[words.index("--config") + 1] == str(recipe.relative_to(ROOT))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_groups_fill_the_batches_of_each_command(recipe):
    keys = settings(recipe)
    for words in [words for words in commands(recipe) if "--config" in words]:
        flags = [flag for flag in ("--num_processes", "--num_gpus") if flag in words]
        processes = int(words[words.index(flags[0]) + 1]) if flags else 1
        batch = keys["per_device_train_batch_size"] * processes * keys.get("gradient_accumulation_steps", 1)
        assert batch % keys.get("num_generations", 1) == 0


@pytest.mark.parametrize("recipe", QWEN, ids=lambda path: path.stem)
def test_a_header_says_what_it_needs_and_the_memory_of_each_command(recipe):
    text = header(recipe)
    assert "# Hardware:" in text and "# Measured:" in text
    named = re.findall(r"^# Memory: (\d+) GPUs?(?: with (\S+))?$", text, re.MULTILINE)
    launched = []
    for words in commands(recipe):
        files = [word for word in words if word.startswith(("recipes/accelerate", "recipes/deepspeed"))]
        flag = "--num_processes" if "--num_processes" in words else "--num_gpus"
        launched.append((words[words.index(flag) + 1], files[0]) if files else ("1", ""))
    assert named == launched
