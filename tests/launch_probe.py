"""Losses that write down how the process that computes them was launched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from trl_custom_losses.losses.policy import GRPOLoss
from trl_custom_losses.losses.preference import SigmoidLoss


def report() -> None:
    """Write the launch's facts to `LAUNCH_PROBE`/rank<r>.json."""
    state = AcceleratorState()
    found: dict[str, Any] = {"world": state.num_processes, "type": state.distributed_type.value}
    if state.distributed_type.value == "DEEPSPEED":
        config = state.deepspeed_plugin.deepspeed_config
        found["stage"] = config["zero_optimization"]["stage"]
        found["offload"] = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
        found["accumulation"] = config["gradient_accumulation_steps"]
        found["clipping"] = config["gradient_clipping"]
    if state.distributed_type.value == "FSDP":
        found["version"] = state.fsdp_plugin.fsdp_version
    Path(os.environ["LAUNCH_PROBE"], f"rank{state.process_index}.json").write_text(json.dumps(found))


class ProbedSigmoid(SigmoidLoss):
    """`sigmoid`, reporting."""

    def forward(self, batch, outputs):
        report()
        return super().forward(batch, outputs)


class ProbedGRPO(GRPOLoss):
    """`grpo`, reporting."""

    def forward(self, batch, outputs):
        report()
        return super().forward(batch, outputs)
