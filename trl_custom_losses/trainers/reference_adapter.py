"""The reference of a model whose adapter was trained before: an adapter named "ref" beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..errors import LossConfigError

TRAINED, REFERENCE = "default", "ref"


@contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """Around TRL's constructor: see that the adapter "ref" of `model` is the reference that it should be.

    TRL compares an adapter that was trained before with its starting point, a copy named "ref" that it adds. Here

    - an adapter "ref" that `model` brings stays as it is and becomes the reference; TRL would refuse the name;
    - the copy is complete: TRL leaves out what PEFT keeps in parameter dictionaries (adapted embeddings, IA3);
    - the copy is frozen, also for prompt learning, and has the precision that TRL gives the trained adapter of a
      quantised model, so that both compute the same at the first step.

    Args:
        model: What the trainer was given; anything but a `PeftModel` is left alone.

    Raises:
        LossConfigError: `model` has an adapter "ref", but the active one is not named "default".
    """
    if not isinstance(model, PeftModel):
        yield
        return
    given = REFERENCE in model.peft_config
    if given:
        if TRAINED not in model.peft_config or model.active_adapters != [TRAINED]:
            raise LossConfigError(
                f"with an adapter '{REFERENCE}' as the reference, the one that trains must be active and be named "
                f"'{TRAINED}'; the model has {sorted(model.peft_config)}, active: {model.active_adapters}"
            )
        model.set_adapter(TRAINED)  # freezes the other one
        _freeze(model)

    def add_adapter(name: str, *args: Any, **kwargs: Any) -> None:
        if name == REFERENCE and given:
            model.named_parameters = nothing
            return
        type(model).add_adapter(model, name, *args, **kwargs)
        if name == REFERENCE:
            _complete(model)

    def nothing(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        # The walk over the parameters that copies the trained adapter into a new reference.
        del model.named_parameters
        return iter(())

    model.add_adapter = add_adapter
    try:
        yield
    finally:
        for name in ("add_adapter", "named_parameters"):
            model.__dict__.pop(name, None)


def check_saving(model: nn.Module, config: Any) -> None:
    """Refuse what ZeRO-3 could not save: whole modules beside an adapter, of which there is a reference, too.

    The weights that DeepSpeed gathers leave out the frozen copy, which the Trainer then misses.

    Args:
        model: Of the trainer, constructed.
        config: The trainer's.

    Raises:
        LossConfigError: The model is such a one.
    """
    plugin = config.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3 or not isinstance(model, PeftModel):
        return
    reference = model.peft_config.get(REFERENCE)
    modules = getattr(reference, "modules_to_save", None)
    if modules:
        raise LossConfigError(
            f"an adapter that was trained before and holds whole modules ({', '.join(modules)}) cannot be saved under "
            "ZeRO-3 with its reference beside it; train it on one process, with DDP or with ZeRO-2, or merge it first "
            "(scripts/merge_adapter.py)"
        )


def _freeze(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if REFERENCE in name.split("."):
            parameter.requires_grad_(False)


def _complete(model: PeftModel) -> None:
    """Copy what TRL's copy leaves out; freeze the copy and give it the trained adapter's coming precision."""
    _freeze(model)
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(f".{TRAINED}"):
            parameters[name.removesuffix(TRAINED) + REFERENCE].data.copy_(parameter.data)
    for name, parameter in parameters.items():
        # TRL keeps DoRA's magnitudes in float32: their updates are too small for bfloat16.
        if quantised and REFERENCE in name.split(".") and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
