"""One of two processes meets a loss that is not finite; each writes how it ended.

torchrun --nproc_per_node 2 -m tests.trainers.nonfinite_worker MODEL OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, NonFiniteLossError
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.trainers.launch import end_rank

#: The rank and the micro-batch, counted from 1, whose loss is NaN: the first of the second step's two.
BAD_RANK, BAD_MICRO_BATCH = 1, 3


class BreaksOnOneRank(SigmoidLoss):
    """DPO that is NaN in one micro-batch of one rank."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.calls = 0

    def forward(self, batch, outputs):
        loss, metrics = super().forward(batch, outputs)
        self.calls += self.training
        bad = self.calls == BAD_MICRO_BATCH and batch.ranks.index == BAD_RANK
        return loss * (torch.nan if bad else 1.0), metrics


def main() -> None:
    """Train until the stop."""
    model, output = Path(sys.argv[1]), Path(sys.argv[2])
    settings = tiny.run_arguments(output / "run") | {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = CustomDPOTrainer(
        model=tiny.load_model(model, seed=1),
        args=CustomDPOConfig(**settings),
        processing_class=tiny.tokenizer(),
        train_dataset=tiny.preference_data(32),
        loss_function=BreaksOnOneRank(),
    )
    try:
        trainer.train()
        message = ""
    except NonFiniteLossError as error:
        message = str(error)
    finite = all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())
    rank = trainer.accelerator.process_index
    found = {"message": message, "finite": finite, "steps": trainer.state.global_step}
    (output / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    end_rank()
