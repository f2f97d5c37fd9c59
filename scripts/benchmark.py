"""Measure this package side by side with what it stands beside: TRL's trainers, TorchJD, its own simplest use.

    python scripts/benchmark.py                              # everything, about 25 minutes on two cores
    python scripts/benchmark.py --quick                      # every case once, small; figures mean nothing
    python scripts/benchmark.py --cases trainers counts      # some of them
    python scripts/benchmark.py --device cuda --cases trainers components
    python scripts/benchmark.py --output scripts/benchmark_results/cpu   # where the README's figures come from

Contenders take turns within a run (A B B A ...), after a warm-up; a table shows medians, and ratios of neighbouring
samples with their quartiles. A JSON file a case keeps every summary with hardware, versions, date and command.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

# Several threads on few cores would measure the scheduler.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from benchmarks import components, engines, grouping, imports, ranks, trainers
from benchmarks.quiet import be_quiet
from benchmarks.workload import HALF_BILLION, MICRO, TINY, Workload
from update_readme import markdown

from trl_custom_losses.cli.environment import environment


@dataclass(frozen=True)
class Case:
    """One thing to measure: `run` takes whether to be quick, and returns its results and what they were measured on."""

    title: str
    run: Callable[[Workload, bool], dict[str, Any]]
    table: Callable[[dict[str, Any]], list[list[str]]]
    devices: tuple[str, ...] = ("cpu",)


def _trainers(work: Workload, quick: bool) -> dict[str, Any]:
    rounds, steps = (2, 3) if quick else (8, 15)
    works = [work] if work.device != "cpu" else [MICRO] if quick else [MICRO, TINY]
    return {one.name: trainers.run(one, rounds, steps) for one in works}


def _trainers_table(found: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    for name, result in found.items():
        header, *lines = trainers.table(result)
        rows = rows or [["model", *header]]
        rows += [[name, *line] for line in lines]
    return rows


CASES: dict[str, Case] = {
    "trainers": Case("Stock TRL trainers against ours", _trainers, _trainers_table, ("cpu", "cuda")),
    "components": Case(
        "Components and balancing against one component",
        lambda work, quick: components.run(work, *((2, 2) if quick else (5, 3))),
        components.table,
        ("cpu", "cuda"),
    ),
    "engines": Case(
        "Balancing against TorchJD's parameter-level engine, three objectives",
        lambda work, quick: engines.run(work, *((2, 2) if quick else (5, 3))),
        engines.table,
        ("cpu", "cuda"),
    ),
    "grouping": Case("Dynamic grouping", lambda work, quick: grouping.run(quick=quick), grouping.table),
    "counts": Case(
        "Collectives and host syncs per optimizer step, two processes",
        lambda work, quick: ranks.counts(1 if quick else 2),
        ranks.counts_table,
    ),
    "ddp": Case(
        "Two processes under DDP",
        lambda work, quick: ranks.times(*((2, 3) if quick else (8, 10))),
        ranks.times_table,
    ),
    "imports": Case("Imports", lambda work, quick: imports.run(2 if quick else 5), imports.table),
}


def hardware(device: str) -> str:
    """What it ran on."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown processor")
    return f"{os.cpu_count()} cores of {model}, one thread a process"


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the chosen cases; returns what was written, by case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="every case once, small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="folder for a JSON file a case")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees; found none")
    wanted = arguments.cases or [name for name, case in CASES.items() if arguments.device in case.devices]
    if misplaced := [name for name in wanted if arguments.device not in CASES[name].devices]:
        parser.error(f"{', '.join(misplaced)} cannot be measured on {arguments.device}")
    be_quiet()
    torch.set_num_threads(1)
    work = HALF_BILLION if arguments.device == "cuda" else MICRO if arguments.quick else TINY
    command = shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    about = {"command": command, "date": date.today().isoformat(), "hardware": hardware(arguments.device)}
    written = {}
    for name in wanted:
        case = CASES[name]
        result = case.run(work, arguments.quick)
        table = case.table(result)
        print(f"\n## {case.title}\n\n{markdown(table)}\n", flush=True)
        found = {"case": name, "title": case.title, **about, "environment": environment()}
        found |= {"table": table, "result": result}
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        written[name] = found
    print(f"{about['hardware']}, {about['date']}, {command}")
    return written


if __name__ == "__main__":
    main()
