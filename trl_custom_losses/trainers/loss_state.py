"""The loss's buffers and parameters, written and read beside the trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base import Loss
from ..errors import CheckpointError, LossConfigError
from .announce import logger

#: File of a checkpoint that holds the loss's state.
STATE_FILE = "loss_function.safetensors"


def check_state(loss: Loss) -> None:
    """Refuse state that a checkpoint could not hold."""
    foreign = [name for name, value in loss.state_dict().items() if not isinstance(value, Tensor)]
    if foreign:
        raise LossConfigError(
            f"the loss '{loss.name}' has state that is no tensor ({', '.join(foreign)}), which a checkpoint could not "
            "hold; keep state in buffers"
        )


def write_state(loss: Loss, folder: Path) -> None:
    """Write the loss's state, if it has any, into a checkpoint that nothing reads before it is whole."""
    state = loss.state_dict()
    if not state:
        return
    folder.mkdir(parents=True, exist_ok=True)  # with sharded weights the Trainer makes it later
    # Clones, since tensors that share memory cannot be written.
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    save_file(copies, folder / STATE_FILE)


def read_state(loss: Loss, folder: Path) -> None:
    """Read what `write_state` wrote.

    Raises:
        CheckpointError: The loss has state and the folder has none, its file is truncated, or it is another loss's.
    """
    file = folder / STATE_FILE
    if not loss.state_dict():
        if file.exists():
            logger.warning("%s is not read: the loss '%s' has no state", file, loss.name)
        return
    if not file.exists():
        raise CheckpointError(f"the loss '{loss.name}' has state, but the checkpoint lacks {file}")
    try:
        state = load_file(file)  # to the host; copied from there to wherever the loss is
    except SafetensorError as error:
        raise CheckpointError(f"the state of the loss '{loss.name}', {file}, cannot be read: {error}") from error
    try:
        loss.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not hold the state of the loss '{loss.name}': {error}") from error


def share_state(loss: Loss, accelerator: Accelerator) -> None:
    """Give every rank the first rank's state, for a loss that each rank has made for itself."""
    if accelerator.num_processes == 1:
        return
    with torch.no_grad():
        for value in loss.state_dict().values():
            value.copy_(broadcast(value.to(accelerator.device)))
