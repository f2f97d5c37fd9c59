"""The comparison of losses: its plans build, a short one runs, and the table says what came of it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
import transformers
import yaml

from trl_custom_losses import LossFunctionRegistry

ROOT = Path(__file__).resolve().parent.parent
PLANS = sorted(ROOT.glob("recipes/comparison*.yaml"))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; what it sets globally is set back."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield importlib.import_module("compare_losses")
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_loss_of_a_plan_builds(path: Path) -> None:
    for trainer, part in yaml.safe_load(path.read_text()).items():
        family = {"dpo": "preference", "grpo": "policy"}[trainer]
        assert part["baseline"] in part["losses"]
        for loss in part["losses"].values():
            LossFunctionRegistry.build(loss, family=family)


def test_a_short_plan_from_end_to_end(compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 1, "batch_size": 8, "learning_rate": 1e-4}
    losses = {"sigmoid": "sigmoid", "two": {"type": "hinge"}, "three": "ipo"}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"dpo": {"settings": settings, "baseline": "sigmoid", "losses": losses}}))
    words = [str(plan), "--fast", "--seeds", "0", "1", "--only", "two", "--output-dir", str(tmp_path / "out")]
    results = compare.main([*words, "--cache-dir", str(tmp_path / "cache")])
    assert [(job.name, job.seed) for job, _ in results] == [("sigmoid", 0), ("sigmoid", 1), ("two", 0), ("two", 1)]
    assert [outcome.loss for _, outcome in results[2:]] == [{"type": "hinge"}] * 2
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[2].startswith("| `sigmoid` |") and table.splitlines()[3].startswith("| `two` |")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["after"] for run in saved["runs"]] == [outcome.after for _, outcome in results]


def test_differences_are_taken_seed_by_seed(compare: ModuleType) -> None:
    def result(name: str, seed: int, after: float) -> tuple:
        job = compare.Job("dpo", name, name, compare.Settings(1, 1, 1.0), seed, Path())
        return job, compare.Outcome("DPO", name, seed, 0.5, after, 10.0, [])

    results = [result("base", 0, 0.6), result("base", 1, 0.8), result("new", 0, 0.7), result("new", 1, 0.9)]
    row = compare.markdown(results, {"dpo": "base"}).splitlines()[3]
    assert row == "| `new` | 80.0 ± 14.1 | +30.0 ± 14.1 | +10.0 ± 0.0 | 10 |"


def test_a_mistake_in_the_plan_shows_before_any_work(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 1, "batch_size": 8, "learning_rate": 1e-4}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"dpo": {"settings": settings, "baseline": "a", "losses": {"a": "sigmiod"}}}))
    with pytest.raises(SystemExit):
        compare.main([str(plan), "--cache-dir", str(tmp_path / "cache")])
    assert "sigmoid" in capsys.readouterr().err and not (tmp_path / "cache").exists()
