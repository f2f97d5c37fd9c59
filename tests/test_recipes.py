"""The recipes: every key is known, they train tiny models, and what their headers say is so."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trl import ScriptArguments, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from trl_custom_losses import CustomDPOConfig, CustomGRPOConfig
from trl_custom_losses.trainers import launch

from . import tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/dpo/*.yaml")) + sorted(ROOT.glob("recipes/grpo/*.yaml"))
GRPO = [path for path in RECIPES if path.parent.name == "grpo"]
QUANTISED = [path for path in RECIPES if "load_in_" in path.read_text()]
PROMPT = 128  # tokens, at least, that a recipe for vLLM leaves for a prompt
TYPES = {"dpo": (ScriptArguments, CustomDPOConfig), "grpo": (GRPOScriptArguments, CustomGRPOConfig)}
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to", "none", "--disable_tqdm", "true"]
#: Ends a prompt by "=" where thoughts are turned off, as a Qwen3 recipe for short answers must do by this name.
NO_THOUGHTS = (
    "{% for message in messages %}{{ message.content }}{% endfor %}{% if enable_thinking is defined and not "
    "enable_thinking %}={% else %}{{ raise_exception('enable_thinking is not set to false') }}{% endif %}"
)
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


def count_of_answers(completions: list[Any], **kwargs: Any) -> list[float]:
    """The tiny reward, also for answers in a chat."""
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return tiny.count_reward(texts)


def parsed(recipe: Path) -> launch.Arguments:
    """The arguments of the recipe as the scripts read it, for a run on a CPU."""
    script, config = TYPES[recipe.parent.name]
    return launch.parse(["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"], script, config)


def answers_at_once(keys: dict[str, Any]) -> bool:
    """Whether a recipe leaves a model that thinks too little room for that."""
    return "Qwen3" in keys["model_name_or_path"] and keys.get("max_completion_length", 10_000) <= 1024


def tiny_run(recipe: Path, tmp_path: Path, model: Path) -> list[str]:
    """A recipe's command line with a tiny model, local data and two steps."""
    family, keys = recipe.parent.name, settings(recipe)
    data = tiny.preference_data() if family == "dpo" else tiny.prompt_data()
    # With these columns there, the scorer of a recipe, a large model, is not asked.
    data = data.add_column("chosen_unsafe", [0.0] * len(data)).add_column("rejected_unsafe", [1.0] * len(data))
    if answers_at_once(keys):
        data = data.map(lambda row: {"chat": [{"role": "user", "content": row["prompt"]}]})
        data = data.remove_columns("prompt").rename_column("chat", "prompt")
        model = Path(shutil.copytree(model, tmp_path / "chat"))
        tokens = tiny.tokenizer()
        tokens.chat_template = NO_THOUGHTS
        tokens.save_pretrained(model)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in data))
    words = ["--config", str(recipe), "--model_name_or_path", str(model), *ON_CPU, "--max_steps", "2"]
    words += ["--dataset_name", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")]
    words += ["--gradient_accumulation_steps", "1", "--eval_strategy", "no"]
    if recipe in QUANTISED and importlib.util.find_spec("bitsandbytes") is None:
        words += ["--load_in_4bit", "false"]
    if family == "grpo":
        words += [
            "--reward_funcs",
            "tests.test_recipes.count_of_answers",
            "--max_completion_length",
            "8",
            "--use_vllm",
            "false",
        ]
        generations = keys.get("num_generations", 8)
        words += ["--per_device_train_batch_size", str(generations)]
    return words


@each_recipe
def test_every_key_of_a_recipe_is_known_and_its_loss_builds(recipe):
    script, config = TYPES[recipe.parent.name]
    words = ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"]
    *_, unknown = TrlParser((script, config, launch.ModelConfig, launch.DatasetMixtureConfig)).parse_args_and_config(
        words, return_remaining_strings=True
    )
    assert unknown == []
    assert parsed(recipe)[1].loss_function == settings(recipe)["loss_function"]


@each_recipe
def test_a_recipe_trains_a_tiny_model_for_two_steps(recipe, tmp_path, dense_model):
    trainer = script_of(recipe).main(tiny_run(recipe, tmp_path, dense_model))
    assert trainer.state.global_step == 2
    loss = settings(recipe)["loss_function"]
    assert trainer.loss_function.name == (loss if isinstance(loss, str) else loss["type"])
    saved = "adapter_model.safetensors" if settings(recipe).get("use_peft") else "model.safetensors"
    assert (tmp_path / "out" / saved).exists()
    if recipe in QUANTISED and importlib.util.find_spec("bitsandbytes") is not None:
        assert any(weight.dtype == torch.uint8 for weight in trainer.model.parameters())


@pytest.mark.parametrize("recipe", QUANTISED, ids=lambda path: path.stem)
def test_a_recipe_names_a_quantisation_that_there_is(recipe):
    pytest.importorskip("bitsandbytes")
    found, keys = launch.get_quantization_config(parsed(recipe)[2]), settings(recipe)
    assert found.load_in_4bit and found.bnb_4bit_quant_type in {"nf4", "fp4"}
    assert found.bnb_4bit_use_double_quant is keys["use_bnb_nested_quant"]
    assert found.bnb_4bit_compute_dtype == getattr(torch, keys["dtype"])


@pytest.mark.parametrize("recipe", GRPO, ids=lambda path: path.stem)
def test_the_rewards_of_a_recipe_are_there(recipe):
    names = settings(recipe)["reward_funcs"]
    assert names
    for name in names:
        reward = launch.load_reward(name)
        assert callable(reward) and reward.__name__ == re.split("[.:]", name)[-1]


@pytest.mark.parametrize("recipe", GRPO, ids=lambda path: path.stem)
def test_vllm_has_a_known_mode_and_room_for_prompt_and_answer(recipe):
    _, training, *_ = parsed(recipe)
    assert training.vllm_mode in {"server", "colocate"}
    assert 0 < training.vllm_gpu_memory_utilization < 1
    if training.use_vllm:
        assert training.vllm_max_model_length >= PROMPT + training.max_completion_length
    else:
        assert not [key for key in settings(recipe) if key.startswith("vllm_")], "keys that do nothing"


@each_recipe
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


def processes_of(words: list[str]) -> int:
    """How many processes a command starts."""
    flags = [flag for flag in ("--num_processes", "--num_gpus") if flag in words]
    return int(words[words.index(flags[0]) + 1]) if flags else 1


@each_recipe
def test_a_header_says_how_its_commands_train_with_the_same_batch(recipe):
    """One process and several, each with the recipe's accumulation, would train with different batches."""
    keys, text = settings(recipe), " ".join(header(recipe).replace("\n#", " ").split())
    counts = sorted({processes_of(words) for words in commands(recipe) if "--config" in words})
    steps = keys["gradient_accumulation_steps"]
    batch = keys["per_device_train_batch_size"] * counts[0] * steps
    expected = [
        (str(count), str(steps * counts[0] // count), str(batch))
        for count in counts[1:]
        if steps * counts[0] % count == 0
    ]
    assert len(expected) == len(counts) - 1, "accumulation cannot make the batches equal"
    found = re.findall(r"On (\d+) GPUs add `--gradient_accumulation_steps (\d+)` for the same batch of (\d+)\.", text)
    assert found == expected
    assert text.count("gradient_accumulation_steps") == len(found)


@each_recipe
def test_groups_fill_the_batches_of_each_command(recipe):
    keys = settings(recipe)
    for words in [words for words in commands(recipe) if "--config" in words]:
        batch = keys["per_device_train_batch_size"] * processes_of(words) * keys.get("gradient_accumulation_steps", 1)
        assert batch % keys.get("num_generations", 1) == 0


@each_recipe
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
