"""What the README says is true: its table, its examples, its tree."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from scripts import update_readme
from trl_custom_losses import CustomDPOConfig, CustomGRPOConfig
from trl_custom_losses.cards import loss_card
from trl_custom_losses.registry import LossFunctionRegistry
from trl_custom_losses.testing import CHECKS

from . import tiny

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_tables_are_those_of_the_registry_and_of_the_kit():
    assert update_readme.with_tables(TEXT) == TEXT, "run scripts/update_readme.py"


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


@pytest.fixture
def my_losses(monkeypatch, tmp_path):
    """The losses to copy, as a module that can be imported."""
    (tmp_path / "my_losses.py").write_text(next(code for code in blocks("python") if "# my_losses.py" in code))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(LossFunctionRegistry, "_functions", dict(LossFunctionRegistry._functions))
    yield
    sys.modules.pop("my_losses", None)


def test_the_losses_to_copy_pass_the_checks(my_losses):
    code = next(code for code in blocks("python") if "# test_my_losses.py" in code)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    (mark,) = scope["test_my_losses"].pytestmark
    assert len(mark.args[1]) == 2 * len(CHECKS)
    for case in mark.args[1]:
        scope["test_my_losses"](*case.values)


def test_the_losses_to_copy_train_in_both_trainers(my_losses, tmp_path, dense_model, monkeypatch):
    code = next(code for code in blocks("python") if "# train_with_my_losses.py" in code)
    hub_model = re.search(r'MODEL = "([^"]+)"', code).group(1)
    quiet = "use_cpu=True, bf16=False, report_to='none', max_steps=2, disable_tqdm=True, logging_steps=1"
    code = code.replace(hub_model, str(dense_model)).replace("Config(", f"Config({quiet}, output_dir=")
    code = code.replace('"outputs/reinforce"', '"outputs/reinforce", max_completion_length=8')
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    dpo, grpo = scope["dpo"], scope["grpo"]
    assert (dpo.state.global_step, grpo.state.global_step) == (2, 2)
    assert "simpo_margin" in dpo.state.log_history[0] and dpo.loss_function.margin == 0.5
    assert grpo.state.log_history[0]["grad_norm"] > 0 and grpo.loss_function.strength == 0.5


def test_the_configuration_in_yaml_builds(my_losses):
    (line,) = re.findall(r"`loss_function: ({type: \"my_losses.*?})`", TEXT)
    loss = LossFunctionRegistry.build(yaml.safe_load(line), family="preference")
    assert (loss.beta, loss.margin) == (2.0, 0.5)


def test_what_it_says_of_migrating_is_true():
    section = TEXT.partition("## Coming from TRL")[2].partition("\n## ")[0]
    configurations = [yaml.safe_load(code) for code in re.findall(r"`({type: [^`]*})`", section)]
    assert len(configurations) > 8
    for config in configurations:
        assert LossFunctionRegistry.build(config).name == config["type"]
    rows = {trainer: re.search(rf"\({trainer}: (.*?)\)", section).group(1) for trainer in ("DPO", "GRPO")}
    for trainer, config in (("DPO", CustomDPOConfig), ("GRPO", CustomGRPOConfig)):
        known = dataclasses.fields(config)
        help_ = next(field for field in known if field.name == "loss_type").metadata["help"]
        named = set(re.findall(r"`(\w+)`", rows[trainer]))
        family = {"DPO": "preference", "GRPO": "policy"}[trainer]
        assert named <= set(LossFunctionRegistry.names(family))
        assert all(f"'{name}'" in help_ for name in named)
        quoted = set(re.findall(r"'(\w+)'", help_.partition("alues")[2].partition(".")[0]))
        assert quoted == named, "TRL has other types than the README lists"


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
