"""TRL's fused language-model head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trl.trainer.utils as trl_utils
from torch import nn
from transformers import PreTrainedConfig

#: Name under which TRL keeps how many columns of the vocabulary its head works on at once, and the value it has there.
_NAME = "_CHUNKED_LOGPROB_CHUNK_SIZE"
_STOCK = getattr(trl_utils, _NAME, None)
#: Tiles are a multiple of it wide, so that their rows stay aligned.
_ALIGNED = 128


@contextmanager
def fitted_head(model: nn.Module) -> Iterator[None]:
    """Let TRL's fused head work on tiles hardly wider than the vocabulary of an unwrapped model.

    It allocates its tiles at full width, 32,768 columns for each of up to 4,096 tokens, in the forward and in the
    backward pass: half a gigabyte in float32, whatever the vocabulary. Tiles hold the same numbers either way. Larger
    vocabularies are left as they are.
    """
    vocabulary = _vocabulary(model)
    if not isinstance(_STOCK, int) or not vocabulary:
        yield
        return
    before = getattr(trl_utils, _NAME)
    setattr(trl_utils, _NAME, min(_STOCK, -(-vocabulary // _ALIGNED) * _ALIGNED))
    try:
        yield
    finally:
        setattr(trl_utils, _NAME, before)


def _vocabulary(model: nn.Module) -> int:
    """Rows of the head, or of the config where the head is sharded; 0 if neither is known."""
    config, head = getattr(model, "config", None), None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    rows = head.weight.size(0) if head is not None and getattr(head, "weight", None) is not None else 0
    size = getattr(config.get_text_config(), "vocab_size", None) if isinstance(config, PreTrainedConfig) else 0
    return max(rows, size or 0)
