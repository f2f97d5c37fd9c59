"""The spread of the margins that is logged is that of all pairs since the last log."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import tiny
from trl_custom_losses import CustomDPOTrainer, PreferenceLoss

from .parity import custom, logged, measure

NAMES = ("std", "min", "max")


class Keeps(PreferenceLoss):
    """The DPO loss, which keeps the margins that it saw, by mode."""

    requires = frozenset({"ref_logps"})
    beta = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bool, list[float]] = {True: [], False: []}

    def forward(self, batch, model_outputs) -> tuple[Tensor, dict]:
        chosen, rejected = (0.1 * model_outputs.log_ratios).chunk(2)
        self.seen[self.training] += (chosen - rejected).detach().tolist()
        return -torch.nn.functional.logsigmoid(chosen - rejected), {}


def _spread(margins: list[float]) -> dict[str, float]:
    return {"std": statistics.pstdev(margins), "min": min(margins), "max": max(margins)}


def _logged(record: dict[str, float], prefix: str = "") -> dict[str, float]:
    return {name: record[f"{prefix}rewards/margins/{name}"] for name in NAMES}


def test_it_covers_all_pairs_of_all_micro_batches_since_the_last_log(dense_model: Path, run_arguments: dict) -> None:
    """Seven pairs in batches of two, the last of one; a log every second optimizer step of two micro-batches."""
    loss = Keeps()
    config = run_arguments | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.1,
    }
    trainer = custom(dense_model, config, loss, train_dataset=tiny.preference_data(7))
    trainer.train()
    records = [record for record in logged(trainer) if "rewards/margins" in record]
    assert len(loss.seen[True]) == 14 and len(records) == 2
    for record, margins in zip(records, (loss.seen[True][:7], loss.seen[True][7:]), strict=True):
        assert _logged(record) == pytest.approx(_spread(margins), rel=1e-6)
        assert record["rewards/margins/std"] > 0.01
        assert not [name for name in record if "pair_mean" in name or "square" in name]


def test_evaluations_have_their_own(dense_model: Path, run_arguments: dict) -> None:
    loss = Keeps()
    config = run_arguments | {"per_device_eval_batch_size": 3}
    trainer = custom(dense_model, config, loss, eval_dataset=tiny.preference_data(8))
    metrics = trainer.evaluate()
    assert len(loss.seen[False]) == 8
    assert _logged(trainer.state.log_history[-1], "eval_") == pytest.approx(_spread(loss.seen[False]), rel=1e-6)
    assert metrics["eval_loss"] > 0


def _spread_of(margins: Tensor) -> dict[str, float]:
    return {name: float(total) / count for name, (total, count, *_) in CustomDPOTrainer._spread(margins).items()}


def test_a_small_spread_beside_a_large_mean_is_not_lost() -> None:
    found = _spread_of(torch.tensor([4000.0, 4000.25]))
    mean, square = found["rewards/margins/pair_mean"], found["rewards/margins/pair_square"]
    assert math.sqrt(square - mean * mean) == pytest.approx(0.125, rel=1e-4)


def test_equal_margins_have_no_spread(dense_model: Path, run_arguments: dict) -> None:
    data = tiny.preference_data(1)
    metrics = measure(custom(dense_model, run_arguments, "sigmoid", train_dataset=data)).metrics
    assert metrics["rewards/margins/std"] == 0.0
    assert metrics["rewards/margins/min"] == metrics["rewards/margins/max"] == pytest.approx(metrics["rewards/margins"])
