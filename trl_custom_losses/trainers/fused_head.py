"""TRL's fused language-model head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trl.trainer.utils as trl_utils
from torch import nn
from transformers import PreTrainedConfig

#: Name under which TRL keeps how many columns of the vocabulary its head works on at once.
_TILE_WIDTH = "_CHUNKED_LOGPROB_CHUNK_SIZE"


@contextmanager
def fitted_head(model: nn.Module) -> Iterator[None]:
    """Let TRL's fused head work on tiles no wider than the vocabulary of an unwrapped model.

    It allocates its tiles at full width, 32,768 columns for each of up to 4,096 tokens, in the forward and in the
    backward pass: half a gigabyte in float32, whatever the vocabulary. Tiles hold the same numbers either way.
    """
    widest = getattr(trl_utils, _TILE_WIDTH, None)
    config = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if isinstance(config, PreTrainedConfig) else None
    if not isinstance(widest, int) or not isinstance(vocabulary, int) or not 0 < vocabulary < widest:
        yield  # the head is as fast as it is
        return
    setattr(trl_utils, _TILE_WIDTH, vocabulary)
    try:
        yield
    finally:
        setattr(trl_utils, _TILE_WIDTH, widest)
