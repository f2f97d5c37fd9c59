"""Measures on each of several processes; started by `ranks.py` through torchrun.

torchrun --nproc_per_node 2 -m benchmarks.worker OUTPUT LIST_OF_SETTINGS_AS_JSON
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from benchmarks import workload
from benchmarks.counting import CollectiveCounter, HostSyncCounter
from benchmarks.measure import alternate, compare, summary
from benchmarks.quiet import be_quiet
from transformers import Trainer, TrainerCallback

from trl_custom_losses.trainers.launch import end_rank

_WARM_UP = 2


class _Window(TrainerCallback):
    """Keeps what was counted from the begin of one step to the begin of another, so that whole steps are counted."""

    def __init__(self, collectives: CollectiveCounter, syncs: HostSyncCounter, steps: int) -> None:
        self.collectives, self.syncs, self.steps = collectives, syncs, steps
        self.found: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _WARM_UP:
            self.collectives.calls.clear()
            self.syncs.waits.clear()
            self.syncs.events = 0
        elif state.global_step == _WARM_UP + self.steps:
            self.found = {
                "collectives": _per_step(self.collectives.calls, self.steps),
                "host_syncs": _per_step(self.syncs.waits, self.steps),
                "event_waits": self.syncs.events / self.steps,
            }


def _per_step(calls: Counter[tuple[str, str]], steps: int) -> dict[str, Any]:
    by_package: Counter[str] = Counter()
    for (package, _), number in calls.items():
        by_package[package] += number
    return {
        "total": sum(calls.values()) / steps,
        "by_package": {package: number / steps for package, number in sorted(by_package.items())},
        "calls": {f"{package}: {what}": number / steps for (package, what), number in sorted(calls.items())},
    }


def count(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Collectives beyond DDP's own and host syncs per optimizer step of this process."""
    collectives, syncs = CollectiveCounter(), HostSyncCounter()
    window = _Window(collectives, syncs, steps)
    trainer.add_callback(window)
    trainer.args.max_steps = _WARM_UP + steps + 1
    with collectives.counting(), syncs.counting(getattr(trainer, "loss_function", None)):
        trainer.train()
    return window.found


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Counts or step times of TRL's trainer and of ours with each of the losses that the settings name."""
    work = replace(workload.TINY, model=workload.TINY.model | settings.get("model", {}))
    options = {"gradient_accumulation_steps": settings["accumulation"], "logging_steps": settings["logging_steps"]}
    make = workload.MAKERS[settings["trainer"]]
    trainers = {"trl": make(work, **workload.STOCK[settings["trainer"]], **options)}
    trainers |= {name: make(work, loss, **options) for name, loss in settings["losses"].items()}
    if settings["measure"] == "counts":
        return {name: count(trainer, settings["steps"]) for name, trainer in trainers.items()}
    timers = {name: workload.step_timer(one, settings["steps"], 3) for name, one in trainers.items()}
    for timer in timers.values():
        timer()
    samples = alternate(timers, settings["rounds"])
    found = {name: summary(values) for name, values in samples.items()}
    return found | {"ratio": compare(samples, "ours", "trl")}


def main() -> None:
    """Measure what the list of settings names."""
    be_quiet()
    torch.set_num_threads(1)
    found = [measure(settings) for settings in json.loads(sys.argv[2])]
    if PartialState().is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    end_rank()
