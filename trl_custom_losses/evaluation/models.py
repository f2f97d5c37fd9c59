"""The base and the trained models, one after the other, with no weights in memory twice."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from ..errors import LossConfigError
from ..trainers.announce import logger


@dataclass(frozen=True)
class Precision:
    """Where and in which type models are computed."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str = "auto", dtype: str = "auto") -> Precision:
        """`auto`: the GPU if there is one; there bfloat16 where it is supported, on a CPU float32.

        Raises:
            LossConfigError: There is no such device.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise LossConfigError(f"`device` is {device}, but torch {torch.__version__} sees no GPU")
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
        return cls(torch.device(device), getattr(torch, dtype))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with the end token where it has no padding token, as TRL's trainers do."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LossConfigError(f"could not load a tokenizer from '{name}': {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def models(
    base: str, trained: Sequence[str], precision: Precision, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base and then each trained model, in evaluation mode, under its name.

    Adapters come first, each put on the one base and taken off again; where one has changed the base itself, that is
    loaded anew for the next. The base is let go before the first checkpoint with weights of its own is loaded, and that
    before the next. Whoever iterates must let go of a model before asking for the next one.

    Args:
        base: Folder or hub name of a model with full weights.
        trained: Folders or hub names of adapters or of models with full weights.
        precision: Where and in which type.
        tokenizer: What will be used with all of them; one that differs from a checkpoint's own is warned of.

    Raises:
        LossConfigError: One cannot be loaded, or an adapter does not fit the base.
    """
    if is_adapter(base):
        raise LossConfigError(f"`base` {base} is an adapter; give the model it was trained on, and it as `trained`")
    adapters = {name: is_adapter(name) for name in trained}  # looked up before the first model is loaded
    for name in trained:
        _compare_tokenizers(name, tokenizer)
    model: PreTrainedModel | None = _load(base, precision)
    yield base, model
    untouched = _sums(model) if any(adapters.values()) else {}
    for name in trained:
        if adapters[name]:
            if model is None:
                model = _load(base, precision)
            adapted = _with_adapter(model, name, base)
            yield name, adapted
            model = adapted.unload()
            del adapted
            if _sums(model) != untouched:
                logger.info("The adapter '%s' changed weights of its base, which is loaded anew where needed.", name)
                model = None
                _free(precision)
    del model
    for name in trained:
        if not adapters[name]:
            _free(precision)
            model = _load(name, precision)
            yield name, model
            del model


def _sums(model: nn.Module) -> dict[str, float]:
    """The sum of every weight and buffer: what tells whether an adapter that was taken off has left something behind.

    LoRA with `bias` other than "none", with an initialisation from the weights (PiSSA, OLoRA) or with replicated layers
    writes into the base, and PEFT's `unload` does not undo it.
    """
    return {name: values.sum(dtype=torch.float64).item() for name, values in model.state_dict().items()}


def is_adapter(name: str) -> bool:
    """Whether a folder or hub name holds an adapter.

    Raises:
        LossConfigError: It looks like a folder and there is none.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise LossConfigError(f"there is no folder '{name}'")
    try:
        return find_adapter_config_file(name) is not None
    except OSError:  # neither a folder nor on the hub: loading says so
        return False


def _load(name: str, precision: Precision) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=precision.dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise LossConfigError(f"could not load a model from '{name}': {first_line(error)}") from error
    return model.to(precision.device).eval()


def _with_adapter(model: PreTrainedModel, name: str, base: str) -> PeftModel:
    """The model with the adapter on it, after checking that all of its weights found their place."""
    try:
        config = PeftConfig.from_pretrained(name)
        if config.is_prompt_learning:
            raise LossConfigError(
                f"'{name}' is an adapter of type {config.peft_type.value}; those that change weights (LoRA and its "
                "kin) can be evaluated"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights are an error below
            adapted = PeftModel.from_pretrained(model, name)
        saved = set(load_peft_weights(name, device="cpu"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, LossConfigError):
            raise
        raise LossConfigError(f"the adapter '{name}' does not fit the base '{base}': {first_line(error)}") from error
    # Not the embeddings of the base itself: an adapter that brings its own would change the base for the models after.
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != expected:
        raise LossConfigError(
            f"the adapter '{name}' does not fit the base '{base}': {len(saved - expected)} of its weights have no "
            f"place in it and {len(expected - saved)} are missing, such as {sorted(saved ^ expected)[0]}; one that "
            "holds embeddings of its base can be merged and given as a checkpoint"
        )
    named = config.base_model_name_or_path
    if named and Path(named).name != Path(base).name:
        logger.warning("The adapter '%s' names '%s' as its base; it is evaluated on '%s'.", name, named, base)
    return adapted.eval()


def _compare_tokenizers(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where a checkpoint brings a tokenizer that would make other tokens."""
    if not (Path(name) / "tokenizer_config.json").is_file():
        return
    own = load_tokenizer(name)
    differing = [
        what
        for what, differs in {
            "vocabulary": own.get_vocab() != tokenizer.get_vocab(),
            "chat template": own.chat_template != tokenizer.chat_template,
        }.items()
        if differs
    ]
    if differing:
        logger.warning(
            "The tokenizer in '%s' has another %s than the one that is used for all models; `--tokenizer` chooses.",
            name,
            " and another ".join(differing),
        )


def first_line(error: Exception) -> str:
    """What an error says first, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _free(precision: Precision) -> None:
    gc.collect()
    if precision.device.type == "cuda":
        torch.cuda.empty_cache()
