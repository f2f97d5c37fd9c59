"""The arithmetic of estimate_memory.py: what lies on one GPU while a recipe trains.

Parameters are counted on the meta device and activations in one decoder layer of full width, so that nothing is
downloaded and nothing of size is allocated. It is arithmetic, not a measurement; `Estimate` says what it rests on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from model_sizes import parameters, saved_by_a_layer
from transformers import PretrainedConfig

from trl_custom_losses.errors import LossConfigError

GB = 1e9
TILE = 4096, 32768  # tokens x vocabulary at a time in TRL's fused head
PROMPT_TOKENS = 256  # of a GRPO prompt, for which no config sets a bound
GPU = 80 * GB  # what vLLM takes its share of
CUDA = 1.0 * GB  # context, workspaces and fragmentation of the allocator: an allowance
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# nf4: half a byte a weight, and a float32 scale for 64 weights, or with nested quantization one byte for 64 and a
# float32 for 256 of those.
NF4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass
class Launcher:
    """How parameters are spread: `kind` is single, ddp, fsdp2, zero2 or zero3."""

    kind: str = "single"
    offload: bool = False
    gpus: int = 1

    @classmethod
    def read(cls, path: Path | None, gpus: int) -> Launcher:
        """From a file for accelerate (YAML) or DeepSpeed (JSON); None is one process."""
        if path is None:
            if gpus != 1:
                raise LossConfigError(f"{gpus} GPUs need a launcher file; found none")
            return cls()
        settings = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        if path.suffix == ".json":
            zero = settings["zero_optimization"]
            offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
            return cls(f"zero{zero['stage']}", offload, gpus)
        if settings["distributed_type"] == "DEEPSPEED":
            zero = settings["deepspeed_config"]
            return cls(f"zero{zero['zero_stage']}", zero["offload_optimizer_device"] != "none", gpus)
        return cls({"MULTI_GPU": "ddp", "FSDP": "fsdp2"}[settings["distributed_type"]], False, gpus)

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("zero")


@dataclass
class Estimate:
    """Bytes on one GPU by term.

    Weights, gradients and optimizer states by the rules of the launcher:

    - single, ddp: everything whole on each GPU, in the dtypes of the parameters; DDP's buckets hold the gradients once
      more. With float32 weights, autocast keeps bfloat16 copies of the matrices during a forward pass.
    - zero2: bfloat16 weights whole; gradients, and in float32 the weights, both moments of AdamW and at the step the
      gradients again, divided by the number of GPUs. zero3: the weights divided, too.
    - fsdp2: float32 weights, gradients and moments divided; frozen weights in their own dtype.

    Sharded weights are gathered for use, two layers at a time, and embedding and head. Offloaded terms count for the
    host. Adapters are float32 (bfloat16 over quantized weights).

    A training step holds the input of each layer (gradient checkpointing), and then what autograd saves in one layer,
    times 1.5 for the gradients of those tensors, or the head's buffers, whichever is more. GRPO also generates: then
    the key-value cache, and ZeRO-3's gathered weights, take the activations' place. The head is TRL's fused one, in
    place as on CUDA; a loss that requires `logits` needs those besides.
    """

    terms: dict[str, float] = field(default_factory=dict)
    host: float = 0.0

    def add(self, name: str, size: float) -> None:
        if size >= 0.005 * GB:
            self.terms[name] = self.terms.get(name, 0.0) + size

    @property
    def total(self) -> float:
        """GB, from the terms as they are shown, so that the sum is right to the last digit."""
        return round(sum(round(size / GB, 2) for size in self.terms.values()), 2)

    def arithmetic(self) -> str:
        return " + ".join(f"{name} {size / GB:.2f}" for name, size in self.terms.items())


def estimate(recipe: dict[str, Any], launcher: Launcher, config: PretrainedConfig) -> Estimate:
    """The memory of one GPU.

    Raises:
        LossConfigError: The recipe sets something that the arithmetic does not know.
    """
    if not str(recipe.get("optim", "adamw_torch")).startswith("adamw_torch"):
        raise LossConfigError(f"the estimate knows AdamW in full precision alone; found optim: {recipe['optim']}")
    found = Estimate()
    trained, frozen, layer_weights = parameters(config, recipe)
    head = config.vocab_size * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    width = WIDTHS[recipe.get("dtype", "float32")]
    shards = launcher.gpus if launcher.kind in ("fsdp2", "zero3") else 1
    full = not recipe.get("use_peft")
    four_bit = bool(recipe.get("load_in_4bit"))
    if four_bit and launcher.kind not in ("single", "ddp"):
        raise LossConfigError(f"4-bit weights are estimated on one GPU and under DDP; found {launcher.kind}")
    if four_bit:
        # Embeddings and head stay as they are.
        found.add("weights", (frozen - embeddings) * NF4[bool(recipe.get("use_bnb_nested_quant"))] + embeddings * width)
    elif launcher.deepspeed:
        _place(found, launcher, "weights", 2 * (frozen + (trained if full else 0)) / shards)
    else:
        found.add("weights", ((4 if launcher.kind == "fsdp2" else width) * trained * full + width * frozen) / shards)
    _add_training(found, launcher, trained, full, adapter=2 if four_bit else 4, width=width)
    _add_reference(found, launcher, recipe, frozen + trained, width)
    if shards > 1 or launcher.offload:
        # Two layers, and as many gradients where they are trained; the units of embedding and head.
        found.add("gathered weights", 2 * layer_weights * (4 if full else 2) + 2 * embeddings)
    mixed = launcher.kind in ("single", "ddp") and width == 4
    if mixed and full:
        found.add("bf16 copies by autocast", 2 * trained)
    _add_activations(found, launcher, recipe, config, weights=frozen + trained, residual=4 if mixed else 2, full=full)
    found.add("CUDA", CUDA)
    return found


def _place(found: Estimate, launcher: Launcher, name: str, size: float) -> None:
    """Count a term on the GPU, or on the host if it is offloaded there."""
    if launcher.offload:
        found.host += size * launcher.gpus
    else:
        found.add(name, size)


def _add_training(found: Estimate, launcher: Launcher, trained: int, full: bool, adapter: int, width: int) -> None:
    """Adapter weights, gradients, optimizer states."""
    name = "" if full else "adapter "
    if launcher.deepspeed:
        if not full:
            _place(found, launcher, "adapter weights", 2 * trained / (launcher.gpus if launcher.kind == "zero3" else 1))
        _place(found, launcher, f"{name}gradients", 6 * trained / launcher.gpus)
        _place(found, launcher, f"{name}master weights and moments", 12 * trained / launcher.gpus)
        return
    shards = launcher.gpus if launcher.kind == "fsdp2" else 1
    each = (4 if launcher.kind == "fsdp2" else width) if full else adapter
    if not full:
        found.add("adapter weights", each * trained / shards)
    found.add(f"{name}gradients", each * trained / shards)
    found.add(f"{name}moments", 2 * each * trained / shards)
    if launcher.kind == "ddp" and launcher.gpus > 1:
        found.add(f"{name}buckets of DDP", each * trained)


def _add_reference(found: Estimate, launcher: Launcher, recipe: dict[str, Any], size: int, width: int) -> None:
    """The reference model: with an adapter, or precomputed, there is none."""
    needed = "per_device_train_batch_size" in recipe and (
        "num_generations" not in recipe or recipe.get("beta", 0.0) != 0.0
    )
    if not needed or recipe.get("use_peft") or (recipe.get("precompute_ref_log_probs") and launcher.kind != "fsdp2"):
        return
    if launcher.deepspeed:
        found.add("reference", 2 * size / (launcher.gpus if launcher.kind == "zero3" else 1))
    elif launcher.kind == "fsdp2":
        # TRL shards it as one unit, so that its forward pass gathers all of it.
        found.add("reference", width * size / launcher.gpus + 2 * size)
    else:
        found.add("reference", width * size)


def sequences(recipe: dict[str, Any]) -> tuple[int, int, int]:
    """Sequences a micro-batch, their length at most, and how many of their tokens the head scores."""
    rows = recipe["per_device_train_batch_size"]
    if "num_generations" in recipe:
        completion = recipe["max_completion_length"]
        return rows, PROMPT_TOKENS + completion, completion
    return 2 * rows, recipe["max_length"], recipe["max_length"]


def _add_activations(
    found: Estimate,
    launcher: Launcher,
    recipe: dict[str, Any],
    config: PretrainedConfig,
    *,
    weights: int,
    residual: int,
    full: bool,
) -> None:
    """The larger of a training step's and, with GRPO, generation's; without checkpointing all layers are kept."""
    rows, length, scored = sequences(recipe)
    tokens, hidden = rows * length, config.hidden_size
    layer = saved_by_a_layer(config, recipe, residual, tokens)
    checkpointed = recipe.get("gradient_checkpointing", True)
    kept = config.num_hidden_layers * (residual * tokens * hidden if checkpointed else layer)
    head = min(rows * scored, TILE[0]) * min(config.vocab_size, TILE[1]) * 2 + 4 * rows * scored * hidden
    head += 4 * config.vocab_size * hidden if full else 0  # its weight's gradient in float32
    if launcher.kind == "fsdp2" and launcher.gpus > 1:
        head += (4 if full else 2) * config.vocab_size * hidden  # gathered by TRL
    training = {"layer inputs": kept, "a layer or the head at work": max(1.5 * layer, head)}
    generation: dict[str, float] = {}
    if recipe.get("use_vllm"):  # holds its share of the GPU all the time, weights included
        found.add("vLLM", recipe.get("vllm_gpu_memory_utilization", 0.3) * GPU)
    elif "num_generations" in recipe:
        steps = recipe.get("steps_per_generation", recipe.get("gradient_accumulation_steps", 1))
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2
        generation["key-value cache"] = rows * steps * length * token
        if launcher.kind == "zero3":
            generation["weights gathered to generate"] = 2 * weights
    chosen = max(training, generation, key=lambda terms: sum(terms.values()))
    for name, size in chosen.items():
        found.add(name, size)
