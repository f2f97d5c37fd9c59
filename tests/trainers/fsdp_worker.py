"""Runs cases of distributed_worker.py, sharded by FSDP2 if accelerate's launcher says so.

[accelerate launch --config_file FSDP2.yaml --num_processes 2] -m tests.trainers.fsdp_worker MODEL OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.fsdp_on_cpu import allow_fsdp_on_cpu
from tests.trainers import deepspeed_worker, distributed_worker
from trl_custom_losses import LossConfigError
from trl_custom_losses.trainers.launch import end_rank

NAMES = (
    "dpo_sigmoid",
    "dpo_sigmoid_accumulated",
    "dpo_margin",
    "dpo_consistency",
    "dpo_balanced",
    "dpo_composed_lora",
    "grpo_grpo",
    "grpo_dynamic",
    "grpo_pairs",
    "grpo_dr_grpo_lora",
)


def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of all ranks put together; every rank has to call it."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}


def resumed(model: Path, output: Path) -> dict[str, Any]:
    """A loss with state, trained in one go and continued from a checkpoint; and the refusal of learned weights."""
    run = deepspeed_worker.make(model, output / "whole", deepspeed_worker.MOVING, save_strategy="steps", save_steps=2)
    run.train()
    again = deepspeed_worker.make(model, output / "resumed", deepspeed_worker.MOVING)
    again.train(resume_from_checkpoint=str(output / "whole" / "checkpoint-2"))
    try:
        refused = str(deepspeed_worker.make(model, output / "refused", deepspeed_worker.LEARNED))
    except LossConfigError as error:
        refused = str(error)
    outcomes = {"whole": deepspeed_worker.outcome(run), "resumed": deepspeed_worker.outcome(again)}
    return outcomes | {"refused": refused}


def main() -> None:
    """Run every case; each rank writes its results."""
    allow_fsdp_on_cpu()
    model, output = Path(sys.argv[1]), Path(sys.argv[2])
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    logs, weights, sharded = {}, {}, {}
    for name in NAMES:
        result = distributed_worker.run(distributed_worker.CASES[name], model, output, world)
        logs[name] = result["logs"]
        sharded[name] = any(isinstance(value, DTensor) for value in result["weights"].values())
        weights[name] = whole(result["weights"])
    found = {"logs": logs, "sharded": sharded}
    if world > 1:
        found["resumed"] = resumed(model, output)
    (output / f"rank{rank}.json").write_text(json.dumps(found))
    torch.save(weights, output / f"weights{rank}.pt")


if __name__ == "__main__":
    main()
    end_rank()
