"""Runs a program under FSDP2 on CPU processes, which accelerate does not offer by itself.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \
        --module tests.fsdp_on_cpu scripts/train_dpo.py --config RECIPE --use_cpu true --bf16 false --dtype float32

torch's `fully_shard` works on a CPU over gloo, but accelerate (1.15) turns FSDP on for accelerators alone: several CPU
processes are MULTI_CPU to it, and the launcher's FSDP settings are dropped without a word.
"""

from __future__ import annotations

import runpy
import sys
from functools import wraps
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Let accelerate take several CPU processes for GPUs while it decides whether the launcher asked for FSDP.

    The device and the process group are chosen before, and stay the CPU and gloo.
    """
    original = AcceleratorState.__init__

    @wraps(original)
    def patched(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        PartialState(kwargs.get("cpu", False))
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = patched


def main() -> None:
    """Run the program named by the first argument with the others."""
    allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
