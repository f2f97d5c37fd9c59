"""Trains under DeepSpeed, in one go and interrupted; rank 0 writes what came out.

Started by `launching.launch`: python -m tests.trainers.deepspeed_worker MODEL OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, LossConfigError
from trl_custom_losses.callbacks import GradientMonitorCallback
from trl_custom_losses.trainers.launch import end_rank

OBJECTIVES = {"pref": {"type": "sigmoid", "beta": 1.0}, "sft": {"type": "sft"}}
MOVING = {
    "type": "dynamic_multi_objective",
    "rule": "dwa",
    "window": 1,
    "objectives": OBJECTIVES,
    "balancing": "upgrad",
}
LEARNED = {"type": "dynamic_multi_objective", "rule": "uncertainty", "objectives": OBJECTIVES}


def make(model: Path, output: Path, loss: dict[str, Any], **options: Any) -> CustomDPOTrainer:
    """A tiny DPO run of four steps."""
    arguments = {**tiny.run_arguments(output), "max_steps": 4, "per_device_train_batch_size": 2, **options}
    return CustomDPOTrainer(
        model=tiny.load_model(model, seed=1),
        ref_model=tiny.load_model(model),
        args=CustomDPOConfig(**arguments, loss_function=loss),
        train_dataset=tiny.preference_data(32),
        processing_class=tiny.tokenizer(),
    )


def outcome(trainer: CustomDPOTrainer) -> dict[str, Any]:
    """Losses and weights of the steps after the second, and the loss's state."""
    state = {name: value.tolist() for name, value in trainer.loss_function.state_dict().items()}
    keys = ("step", "loss", "pref_weight", "sft_weight")
    logs = [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]
    return {"state": state, "logs": logs[2:]}


def main() -> None:
    """Run both trainings, the second one monitored, and the refusals."""
    model, output = Path(sys.argv[1]), Path(sys.argv[2])
    whole = make(model, output / "whole", MOVING, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(model, output / "resumed", MOVING)
    resumed.add_callback(GradientMonitorCallback(every=1))
    resumed.train(resume_from_checkpoint=str(output / "whole" / "checkpoint-2"))
    try:
        refused = str(make(model, output / "refused", LEARNED))
    except LossConfigError as error:
        refused = str(error)
    sharded = make(model, output / "sharded", MOVING)
    sharded.add_callback(GradientMonitorCallback(every=1, layers=True))
    try:
        hidden = str(sharded.train())
    except LossConfigError as error:
        hidden = str(error)
    norms = [
        entry["grad_norm/pref"] for entry in resumed.state.log_history if entry.get("step", 0) > 2 and "loss" in entry
    ]
    result = {"whole": outcome(whole), "resumed": outcome(resumed), "refused": refused}
    result |= {"norms": norms, "hidden": hidden}
    (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end_rank()
