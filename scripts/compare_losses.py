"""Train the quick start's base models with many losses at one budget and compare what they reach.

    python scripts/compare_losses.py recipes/comparison.yaml                        # all of it, 5 seeds
    python scripts/compare_losses.py recipes/comparison.yaml --only adaptive_dpo clipped_loss --seeds 0 1
    python scripts/compare_losses.py recipes/comparison.yaml --workers 2            # runs side by side

The plan names, for each trainer, its settings, the baseline and the losses. Every loss starts from the same base model
of a seed and sees the same data in the same order, so differences to the baseline are taken seed by seed. Prints a
Markdown table and writes every run to `--output-dir`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from addition_task import PretrainConfig, addition_task, cache_root
from quickstart import CONFIGS, FAST_PRETRAINING, Settings, configuration, quiet, solved, train
from quickstart_report import Outcome, environment

from trl_custom_losses import LossConfigError


@dataclass(frozen=True)
class Job:
    """One run: `loss` in `trainer` from the base model of `seed`."""

    trainer: str
    name: str
    loss: Any
    settings: Settings
    seed: int
    cache_dir: Path
    fast: bool = False


def run(job: Job) -> tuple[Job, Outcome]:
    """Train one loss; called in a process of its own."""
    quiet()
    torch.set_num_threads(1)
    task = addition_task(FAST_PRETRAINING if job.fast else PretrainConfig(), job.seed, job.cache_dir)
    before = solved(task.new_model(), task)
    return job, train(job.trainer, task, job.loss, job.settings, job.seed, before, progress=False)


def read_plan(path: Path, arguments: argparse.Namespace) -> tuple[list[Job], dict[str, str]]:
    """All runs of a plan, and the baseline of each trainer.

    Raises:
        LossConfigError: A loss cannot be built.
    """
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    jobs, baselines = [], {}
    for trainer, part in plan.items():
        settings = Settings(**part["settings"])
        if arguments.fast:
            settings = Settings(steps=2, batch_size=16, learning_rate=1e-4, extra=settings.extra)
        baselines[trainer] = part["baseline"]
        for name, loss in part["losses"].items():
            if arguments.only and name not in (*arguments.only, part["baseline"]):
                continue
            configuration(trainer, loss, settings, seed=0, folder="")  # a mistake shows before anything is trained
            jobs += [
                Job(trainer, name, loss, settings, seed, arguments.cache_dir, arguments.fast)
                for seed in arguments.seeds
            ]
    return jobs, baselines


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def markdown(results: Sequence[tuple[Job, Outcome]], baselines: dict[str, str]) -> str:
    """One table a trainer: accuracy, change to the base model, and difference to the baseline seed by seed."""
    lines = []
    for trainer in CONFIGS:
        runs: dict[str, dict[int, Outcome]] = {}
        for job, outcome in results:
            if job.trainer == trainer:
                runs.setdefault(job.name, {})[job.seed] = outcome
        if not runs:
            continue
        baseline = runs[baselines[trainer]]
        lines += [
            f"| {trainer.upper()} loss | held-out accuracy, % | change, points | against `{baselines[trainer]}`, "
            "points | seconds |",
            "|---|---|---|---|---|",
        ]
        for name, by_seed in runs.items():
            after = [100 * outcome.after for outcome in by_seed.values()]
            change = [100 * (outcome.after - outcome.before) for outcome in by_seed.values()]
            against = [100 * (by_seed[seed].after - baseline[seed].after) for seed in by_seed]
            seconds = statistics.mean(outcome.seconds for outcome in by_seed.values())
            difference = "" if name == baselines[trainer] else spread(against, "+")
            lines.append(f"| `{name}` | {spread(after)} | {spread(change, '+')} | {difference} | {seconds:.0f} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[tuple[Job, Outcome]]:
    """Run the plan; returns every job with what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file: trainer -> settings, baseline, losses")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", default=[], help="names of the plan; the baselines always run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/comparison"))
    parser.add_argument("--cache-dir", type=Path, default=cache_root(), help="where base models are kept")
    parser.add_argument("--fast", action="store_true", help="two steps on a toy model: checks that all runs")
    arguments = parser.parse_args(argv)
    try:
        jobs, baselines = read_plan(arguments.plan, arguments)
    except LossConfigError as error:
        parser.error(str(error))
    quiet()
    torch.set_num_threads(1)
    config = FAST_PRETRAINING if arguments.fast else PretrainConfig()
    for seed in arguments.seeds:  # before the workers start, so that each base model is made once
        addition_task(config, seed, arguments.cache_dir)
    results = []
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            job, outcome = future.result()
            results.append((job, outcome))
            print(
                f"[{len(results)}/{len(jobs)}] {job.trainer} {job.name} seed {job.seed}: {outcome.before:.1%} -> "
                f"{outcome.after:.1%} in {outcome.seconds:.0f} s",
                flush=True,
            )
    order = {(job.trainer, job.name, job.seed): index for index, job in enumerate(jobs)}
    results.sort(key=lambda result: order[result[0].trainer, result[0].name, result[0].seed])
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    content = environment() | {
        "runs": [{"name": job.name, **asdict(outcome)} for job, outcome in results],
    }
    (arguments.output_dir / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    table = markdown(results, baselines)
    (arguments.output_dir / "table.md").write_text(table, encoding="utf-8")
    print("\n" + table)
    return results


if __name__ == "__main__":
    main()
