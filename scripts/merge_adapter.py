"""Merge an adapter into its base model, and save or push the result as an ordinary model.

    python scripts/merge_adapter.py --adapter outputs/my_run --output outputs/my_run_merged
    python scripts/merge_adapter.py --adapter me/my-adapter --output merged --dtype bfloat16 --push_to_hub me/my-model

The base model is the one that adapter_config.json names. It is loaded without quantisation, also for an adapter that
was trained on 4 or 8 bits, and one that is stored quantised is converted back. The tokenizer and its chat template are
the adapter's, else the base model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from trl_custom_losses import LossConfigError
from trl_custom_losses.trainers.continued import find_adapter, load_adapter, load_base, load_processor
from trl_custom_losses.trainers.launch import exit_with_message


def merge(
    adapter: str,
    output: Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Merge `adapter` into its base model and write model and tokenizer to `output`; returns the merged model.

    Args:
        adapter: Folder or hub repository of the adapter.
        output: Folder to write, new or empty.
        revision: Of the adapter.
        dtype: "float32", "bfloat16", "float16", or "auto" for what the base model is stored in.
        push_to_hub: Hub repository to upload the result to; None uploads nothing.
        trust_remote_code: Whether the base model's own code may run.

    Raises:
        LossConfigError: There is no adapter, it cannot be merged, or `output` holds something already.
    """
    try:
        config = find_adapter(adapter, revision)
    except OSError as error:
        raise LossConfigError(f"there is no folder '{adapter}', and the hub has none of that name: {error}") from error
    if config is None:
        raise LossConfigError(f"'{adapter}' holds no adapter: there is no adapter_config.json")
    if config.is_prompt_learning:
        raise LossConfigError(
            f"'{adapter}' is an adapter of type {config.peft_type.value}, which adds positions to the prompt and has "
            "no weights to merge"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LossConfigError(f"`output` {output} exists and is not an empty folder")
    base = load_base(adapter, config, dtype=dtype, device_map=None, trust_remote_code=trust_remote_code)
    if getattr(base, "hf_quantizer", None) is not None:
        base = base.dequantize()
        base._weight_conversions = None  # saving would reverse what made the codes, which transformers cannot
    tokenizer = load_processor(base, adapter, revision, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, trust_remote_code=trust_remote_code
        )
    adapted = load_adapter(base, adapter, revision=revision, tokenizer=tokenizer)
    separate_adapted_embeddings(base)
    model = adapted.merge_and_unload(safe_merge=True)
    print(
        f"Merged into {config.base_model_name_or_path}, loaded without quantisation ({model.dtype}). An adapter that "
        "was trained on 4 or 8 bits was fitted to rounded weights, so its merged model differs by that rounding."
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"Saved to {output}")
    if push_to_hub is not None:
        model.push_to_hub(push_to_hub)
        tokenizer.push_to_hub(push_to_hub)
        print(f"Pushed to {push_to_hub}")
    return model


def separate_adapted_embeddings(base: PreTrainedModel) -> None:
    """Give head and input embeddings that share their weights weights of their own, if an adapter changes either.

    Such an adapter changes what goes in or what comes out; merged into shared weights it would change both.

    Args:
        base: With the adapter on it.
    """
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if ends[1] is None or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embeddings, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if head.weight is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    base.config.get_text_config().tie_word_embeddings = False
    base.all_tied_weights_keys = {}
    print("The adapter changes input embeddings or head: in the merged model they have weights of their own.")


def main(arguments: Sequence[str] | None = None) -> PreTrainedModel:
    """Merge as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or hub repository")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--revision", help="of the adapter")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--push_to_hub", metavar="NAME", help="hub repository to upload the merged model to")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return merge(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    exit_with_message(main)
