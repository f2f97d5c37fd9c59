"""Logs of made-up runs, and folders as a Trainer leaves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def composed_log(steps: int = 6) -> list[Entry]:
    """Two components, the second negative, with an evaluation at every second step and a summary at the end."""
    entries: list[Entry] = []
    for step in range(1, steps + 1):
        pref, bonus = 1.0 / step, -0.1 * step
        entries.append(
            {
                "step": step,
                "epoch": step / steps,
                "loss": 2.0 * pref + 0.5 * bonus,
                "pref_loss": pref,
                "pref_weight": 2.0,
                "bonus_loss": bonus,
                "bonus_weight": 0.5,
                "total_loss": 2.0 * pref + 0.5 * bonus,
                "learning_rate": 1e-3 * (1 - step / steps),
                "rewards/margins": 0.1 * step,
                "rewards/margins/std": 0.05 * step,
                "rewards/margins/min": -0.2,
                "rewards/margins/max": 0.4 * step,
            }
        )
        if step % 2 == 0:
            entries.append({"step": step, "epoch": step / steps, "eval_loss": 3.0 + step, "eval_runtime": 0.1})
    entries.append({"step": steps, "train_runtime": 75.0, "train_loss": 0.5, "total_flos": 1.0})
    return entries


def nested_log(steps: int = 5) -> list[Entry]:
    """A composition of `a` and `b`, where `b` is made of `c` and `d`: as the trainer names what they log."""
    entries = []
    for step in range(1, steps + 1):
        c, d, a = 0.3 * step, 1.0 / step, 0.7 + 0.1 * step
        b = 2.0 * c + 0.25 * d
        values = {"a": (a, 1.5), "b": (b, 0.5), "c": (c, 2.0), "d": (d, 0.25)}
        entry = {"step": step, "total_loss": 1.5 * a + 0.5 * b, "b/total_loss": b}
        for name, (loss, weight) in values.items():
            entry |= {f"{name}_loss": loss, f"{name}_weight": weight}
        entries.append(entry)
    return entries


def write_state(folder: Path, entries: Sequence[Entry], **fields: Any) -> Path:
    """Write a `trainer_state.json`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    step = max((entry["step"] for entry in entries), default=0)
    state = {"log_history": list(entries), "global_step": step, "max_steps": step, **fields}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder
