"""Adapters that were trained before: finding and loading them, with the base model and the tokenizer they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file, find_adapter_config_file
from trl.trainer.utils import create_model_from_path

from ..errors import LossConfigError


def find_adapter(name: str | None, revision: str | None = None) -> PeftConfig | None:
    """The adapter's configuration, if `name` is a folder or hub repository that holds an adapter; else None."""
    if name is None or find_adapter_config_file(name, revision=revision) is None:
        return None
    return PeftConfig.from_pretrained(name, revision=revision)


def load_base(name: str, adapter: PeftConfig, **arguments: Any) -> PreTrainedModel:
    """The model that the adapter `name` was trained on, at the revision it was trained on.

    Args:
        name: Of the adapter, for messages.
        adapter: Its configuration.
        **arguments: As for TRL's own loading of a model, `from_pretrained`'s.

    Raises:
        LossConfigError: The adapter does not say which model that was, or it cannot be found.
    """
    base = adapter.base_model_name_or_path
    if not base:
        raise LossConfigError(f"adapter_config.json of '{name}' does not name a base model (`base_model_name_or_path`)")
    try:
        return create_model_from_path(base, **{**arguments, "revision": adapter.revision})
    except OSError as error:
        raise LossConfigError(
            f"the base model '{base}' of the adapter '{name}' could not be loaded: {error}"
        ) from error


def load_adapter(
    base: PreTrainedModel,
    name: str,
    *,
    revision: str | None = None,
    trainable: bool = False,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    **arguments: Any,
) -> PeftModel:
    """The adapter `name` on its base model, active and named "default".

    Args:
        base: As `load_base` returns it.
        name: Folder or hub repository.
        revision: Of the adapter.
        trainable: Whether its weights require a gradient.
        tokenizer: The adapter's own; tokens that were added to it need room in the base model's embeddings.
        **arguments: Further ones of `PeftModel.from_pretrained`.
    """
    tokens = getattr(tokenizer, "tokenizer", tokenizer)
    # `num_embeddings`, since under ZeRO-3 the weight itself is empty here.
    if tokens is not None and len(tokens) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokens))
    return PeftModel.from_pretrained(base, name, revision=revision, is_trainable=trainable, **arguments)


def load_processor(
    base: PreTrainedModel, name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    """The tokenizer, or processor, saved beside an adapter, with its chat template; None if there is none."""
    # The model's config is given, since beside an adapter there is none.
    arguments = {"config": base.config, "revision": revision, "trust_remote_code": trust_remote_code}
    kinds = {"processor_config.json": AutoProcessor, "tokenizer_config.json": AutoTokenizer}
    for file, kind in kinds.items():
        try:
            cached_file(name, file, revision=revision)
        except OSError:  # how it says that there is no such file
            continue
        return kind.from_pretrained(name, **arguments)
    return None


def continued_adapter(
    name: str,
    adapter: PeftConfig,
    *,
    revision: str | None,
    init_arguments: Mapping[str, Any],
    training: Any,
    quantization: Any = None,
) -> dict[str, Any]:
    """`model` and `processing_class` of a trainer that trains the adapter `name` further.

    The base model is loaded as TRL loads a model it is given by name.

    Args:
        name: Folder or hub repository of the adapter.
        adapter: Its configuration.
        revision: Of the adapter; the base model's is the one that the adapter was trained on.
        init_arguments: `model_init_kwargs`.
        training: The trainer's config.
        quantization: `BitsAndBytesConfig` for the base model, or None.
    """
    arguments = {name: value for name, value in init_arguments.items() if name != "revision"}
    if quantization is not None:
        arguments["quantization_config"] = quantization
    if training.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        arguments["device_map"] = None
    base = load_base(name, adapter, **arguments)
    processor = load_processor(base, name, revision, trust_remote_code=training.trust_remote_code)
    # ZeRO-3 gathers small parameters together, which must be of one type.
    zero3 = training.deepspeed_plugin is not None and training.deepspeed_plugin.zero_stage == 3
    model = load_adapter(
        base,
        name,
        revision=revision,
        trainable=True,
        tokenizer=processor,
        autocast_adapter_dtype=quantization is not None or not zero3,
    )
    return {"model": model, "processing_class": processor}
