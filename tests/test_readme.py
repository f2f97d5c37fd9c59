"""What the README says is true: its table, its examples, its tree."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import yaml

from scripts import update_readme
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, CustomGRPOConfig, CustomGRPOTrainer
from trl_custom_losses.cards import loss_card
from trl_custom_losses.registry import LossFunctionRegistry

from . import tiny

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_table_of_losses_is_that_of_the_registry():
    assert update_readme.with_table(TEXT) == TEXT, "run scripts/update_readme.py"


@pytest.mark.parametrize("name", LossFunctionRegistry.names())
def test_every_loss_states_summary_formula_and_source(name):
    card = loss_card(name)
    assert card.summary and card.formula and card.source


def test_a_table_out_of_date_is_noticed(tmp_path, monkeypatch):
    copy = tmp_path / "README.md"
    copy.write_text(TEXT.replace("| `hinge` |", "| `hingee` |"))
    monkeypatch.setattr(update_readme, "README", copy)
    assert update_readme.main(["--check"]) == 1
    assert update_readme.main([]) == 0
    assert update_readme.main(["--check"]) == 0
    assert copy.read_text() == TEXT


def test_the_first_example_runs(monkeypatch, tmp_path, dense_model):
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    hub_model = re.search(r'model="([^"]+)"', code).group(1)
    code = code.replace(hub_model, str(dense_model)).replace('"out"', f'"{tmp_path}", **quiet')
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: tiny.preference_data())
    quiet = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 1,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    scope = {"quiet": quiet}
    exec(compile(code, "README.md", "exec"), scope)
    logged = scope["trainer"].state.log_history[0]
    promised = re.search(r"logs TRL's metrics, and (.*)", code).group(1).replace(" and ", ", ").split(", ")
    assert {*promised, "rewards/margins", "loss"} <= logged.keys()


def test_the_losses_to_copy_train_in_both_trainers(monkeypatch, tmp_path, dense_model, run_arguments):
    (tmp_path / "my_losses.py").write_text(next(code for code in blocks("python") if "my_losses.py" in code))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(LossFunctionRegistry, "_functions", dict(LossFunctionRegistry._functions))
    (block,) = [block for block in blocks("yaml") if "my_losses:" in block]
    configurations = [yaml.safe_load(line)["loss_function"] for line in block.splitlines()]
    common = {"processing_class": tiny.tokenizer()}
    dpo = CustomDPOTrainer(
        model=tiny.load_model(dense_model, seed=1),
        args=CustomDPOConfig(**run_arguments, max_steps=1, loss_function=configurations[0]),
        train_dataset=tiny.preference_data(),
        **common,
    )
    dpo.train()
    assert "simpo_margin" in dpo.state.log_history[0]
    assert dpo.loss_function.margin == 0.5
    grpo = CustomGRPOTrainer(
        model=tiny.load_model(dense_model, seed=1),
        reward_funcs=tiny.count_reward,
        args=CustomGRPOConfig(**run_arguments, max_steps=1, max_completion_length=8, loss_function=configurations[1]),
        train_dataset=tiny.prompt_data(),
        **common,
    )
    grpo.train()
    assert grpo.state.log_history[0]["grad_norm"] > 0


def test_the_schedules_it_shows_build():
    (block,) = [block for block in blocks("yaml") if "schedule:" in block]
    loss = LossFunctionRegistry.build(yaml.safe_load(block)["loss_function"], family="preference")
    assert "beta" in loss.leaves()[0].schedules and "sft" in loss.weight_schedules


def test_the_files_it_names_exist():
    tree = next(part for part in TEXT.split("```")[1::2] if "cards.py" in part)
    root = README.parent
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        base = root / "trl_custom_losses" if line.startswith(" ") else root
        assert (base / name).exists(), name
    for path in re.findall(r"(?:scripts|recipes)/[\w./-]+\.(?:sh|py|yaml)", TEXT):
        assert (root / path).exists(), path
