"""The benchmarks measure what they say: order, ratios, memory, collectives and host syncs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
RESULTS = SCRIPTS / "benchmark_results" / "cpu"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts' folder on the import path, as when a script is run; what a benchmark silences speaks again."""
    import logging
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    filters, threads, verbosity = warnings.filters[:], torch.get_num_threads(), transformers_logging.get_verbosity()
    yield
    warnings.filters[:] = filters
    logging.disable(logging.NOTSET)
    transformers_logging.set_verbosity(verbosity)
    datasets.enable_progress_bars()
    torch.set_num_threads(threads)


@pytest.fixture
def measure(scripts: None) -> ModuleType:
    return import_module("benchmarks.measure")


@pytest.fixture
def counting(scripts: None) -> ModuleType:
    return import_module("benchmarks.counting")


def test_contenders_take_turns(measure: ModuleType) -> None:
    order: list[str] = []

    def contender(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = measure.alternate({"a": lambda: contender("a"), "b": lambda: contender("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_a_ratio_is_the_median_of_neighbours(measure: ModuleType) -> None:
    samples = {"ours": [1.0, 20.0, 3.0], "peer": [2.0, 10.0, 3.0]}
    found = measure.compare(samples, "ours", "peer")
    assert found == {"median": 1.0, "lower_quartile": 0.75, "upper_quartile": 1.5, "samples": 3}
    assert measure.interval(found) == "1.000 [0.750, 1.500]"
    assert measure.summary([0.5]) == {"median": 0.5, "lower_quartile": 0.5, "upper_quartile": 0.5, "samples": 1}
    assert measure.milliseconds({"median": 0.0123}) == "12.3"


def test_peak_memory_is_what_was_held_at_once(measure: ModuleType) -> None:
    kept = []

    def work() -> None:
        kept.append(torch.empty(1_000_000))  # 4 MB, kept
        torch.empty(2_000_000)  # 8 MB, freed
        torch.empty(1_500_000)  # 6 MB, freed

    assert measure.peak_memory(work) == pytest.approx(12e6, rel=0.01)


def test_host_syncs_are_counted_by_who_asks(counting: ModuleType) -> None:
    device = torch.device("cpu")  # stands for the accelerator, when it is given as a device
    counter = counting.HostSyncCounter()
    with counter.counting(None):
        on_device = torch.arange(4.0, device=device)
        on_device.sum().item()
        bool(on_device[0] > 0)
        on_device[on_device > 1].mean()
        torch.cat([on_device, on_device]).tolist()
        torch.tensor([1.0], device=device)
        on_host = on_device.to("cpu")
        on_host.sum().item()  # what has been copied may be read
        torch.arange(3).tolist()  # was never elsewhere
        torch.arange(3).to(device).sum().item()
        on_device.to(device)
    found = {what: number for (_, what), number in counter.waits.items()}
    assert found == {
        "`item`": 2,
        "`__bool__`": 1,
        "indexing with a mask": 1,
        "`tolist`": 1,
        "`tensor`": 1,
        "`to('cpu')`": 1,
        "`to(device)` from the host": 1,
    }
    assert {package for package, _ in counter.waits} == {"other"}


def test_what_travels_with_the_exchange_is_an_event_not_a_sync(counting: ModuleType) -> None:
    from trl_custom_losses.callbacks.exchange import SumOverRanks

    class Alone:
        device = torch.device("cpu")

        def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
            return tensor

    counter = counting.HostSyncCounter()
    with counter.counting(None):
        exchange = SumOverRanks(torch.ones(2, device=torch.device("cpu")), Alone())
        first, second = exchange.on_host().split([1, 1])
        assert bool(first > 0) and second.item() == 1.0
    assert not counter.waits and counter.events == 1


@pytest.mark.distributed
def test_few_collectives_and_no_host_sync_of_ours_where_nothing_logs(scripts: None) -> None:
    """Two processes; also that TRL's, which are known to be more, are seen."""
    found = import_module("benchmarks.ranks").counts(1, accumulations=(2,), logging=(1000,))
    for case, contenders in found.items():
        limit = 2 if case.startswith("dpo") else 1
        for name, counted in contenders.items():
            ours = counted["collectives"]["by_package"].get("trl_custom_losses", 0)
            assert ours == (0 if name == "trl" else limit), (case, name, counted)
            assert counted["host_syncs"]["by_package"].get("trl_custom_losses", 0) == 0, (case, name, counted)
            assert counted["event_waits"] == (name != "trl")
        assert contenders["trl"]["collectives"]["total"] >= contenders["ours"]["collectives"]["total"] + 4
        assert contenders["trl"]["host_syncs"]["total"] > contenders["ours"]["host_syncs"]["total"]


def test_the_script_prints_tables_and_writes_what_it_measured(
    scripts: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    benchmark = import_module("benchmark")
    benchmark.main(["--quick", "--cases", "trainers", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert (
        "| model | trainer | what | TRL | TRL, fitted | ours | ours/TRL | ours/(TRL, fitted) | ours/bare |" in printed
    )
    found = json.loads((tmp_path / "trainers.json").read_text())
    assert found["command"] == f"python scripts/benchmark.py --quick --cases trainers --output {tmp_path}"
    assert {"date", "hardware", "environment"} <= found.keys()
    for result in found["result"].values():
        for trainer in ("dpo", "grpo"):
            assert result[trainer]["step"]["ours"]["median"] > 0
            memory = result[trainer]["peak_memory"]
            assert memory["ours"] < memory["trl"] and memory["ours"] == pytest.approx(memory["fitted"], rel=0.02)


def test_what_cannot_be_measured_is_refused(scripts: None, capsys: pytest.CaptureFixture) -> None:
    benchmark = import_module("benchmark")
    for words in (["--device", "cuda"], ["--cases", "speed"]):
        if words[0] == "--device" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(words)
    assert "invalid choice: 'speed'" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["trainers", "components", "engines", "grouping", "counts", "ddp", "imports"])
def test_the_results_that_are_kept_make_tables(case: str, scripts: None) -> None:
    kept: dict[str, Any] = json.loads((RESULTS / f"{case}.json").read_text())
    assert kept["case"] == case and "--quick" not in kept["command"]
    rows = import_module("benchmark").CASES[case].table(kept["result"])
    assert rows == kept["table"] and len(rows) > 1 and len({len(row) for row in rows}) == 1


def test_the_page_of_results_is_that_of_the_files(scripts: None) -> None:
    update_readme = import_module("update_readme")
    assert update_readme.PAGE.read_text() == update_readme.page_of_benchmarks(), "run scripts/update_readme.py"
    assert set(update_readme.CASES) == set(import_module("benchmark").CASES)
