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
from model_sizes import Sizes, is_grpo, parameters, saved_by_a_layer, setting, weight_width
from transformers import PretrainedConfig

from trl_custom_losses.errors import LossConfigError

GB = 1e9
TILE = 4096, 32768  # tokens x vocabulary at a time in TRL's fused head
PROMPT_TOKENS = 256  # of a GRPO prompt, for which no config sets a bound
GPU = 80 * GB  # what vLLM takes its share of
CUDA = 1.0 * GB  # context, workspaces and fragmentation of the allocator: an allowance
BUCKET = 500_000_000  # elements that DeepSpeed collects before it reduces gradients, where no file says otherwise
#: Keys that change what lies on the GPU where they are set, and that no term below follows.
UNKNOWN = (
    "activation_offloading",
    "cast_lm_head_to_fp32",
    "fp16",
    "lora_target_parameters",
    "reward_model_name_or_path",
    "use_liger_kernel",
)
# nf4: half a byte a weight, and a float32 scale for 64 weights, or with nested quantization one byte for 64 and a
# float32 for 256 of those.
NF4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass
class Launcher:
    """How parameters are spread: `kind` is single, ddp, fsdp2, zero2 or zero3."""

    kind: str = "single"
    offload: bool = False
    gpus: int = 1
    bucket: int | None = BUCKET  # of DeepSpeed, elements; None is "auto", the square of the hidden size
    overlap: bool = False  # whether ZeRO-2 reduces one bucket while the next fills

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
            places = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
            bucket = zero.get("reduce_bucket_size", BUCKET)
            bucket = None if bucket == "auto" else int(bucket)
            overlap = bool(zero.get("overlap_comm"))
            return cls(f"zero{zero['stage']}", _offloads(path, zero["stage"], places), gpus, bucket, overlap)
        if settings["distributed_type"] == "DEEPSPEED":
            zero = settings["deepspeed_config"]
            if "deepspeed_config_file" in zero:
                return cls.read(Path(zero["deepspeed_config_file"]), gpus)
            places = [zero.get(f"offload_{what}_device", "none") for what in ("optimizer", "param")]
            return cls(f"zero{zero['zero_stage']}", _offloads(path, zero["zero_stage"], places), gpus)
        return cls({"MULTI_GPU": "ddp", "FSDP": "fsdp2"}[settings["distributed_type"]], False, gpus)

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("zero")


def _offloads(path: Path, stage: int, places: list[str]) -> bool:
    """Whether a file keeps optimizer states and weights on the host; one of the two alone is not estimated."""
    away = {place != "none" for place in places}
    if away == {False}:
        return False
    if away != {True} or stage != 3:
        raise LossConfigError(
            f"the estimate knows offloading of optimizer states and weights together, with ZeRO-3; found {path.name} "
            f"with stage {stage}, optimizer states on {places[0]} and weights on {places[1]}"
        )
    return True


@dataclass
class Estimate:
    """Bytes on one GPU by term.

    Weights, gradients and optimizer states by the rules of the launcher:

    - single, ddp: everything whole on each GPU, in the dtypes of the parameters; DDP's buckets hold the gradients once
      more. With float32 weights, autocast keeps bfloat16 copies of the matrices during a forward pass.
    - zero2: bfloat16 weights whole; gradients, and in float32 the weights, both moments of AdamW and at the step the
      gradients again, divided by the number of GPUs. zero3: the weights divided, too.
    - fsdp2: float32 weights, gradients and moments divided; frozen weights in their own dtype.

    Sharded weights are gathered for use, two layers at a time, and embedding and head. DeepSpeed reduces gradients in a
    buffer of `reduce_bucket_size` elements, which ZeRO-3 keeps and ZeRO-2 has during a backward pass (two of them with
    `overlap_comm`). Offloaded terms count for the host, the reference among them. Adapters are float32, and bfloat16
    over quantized weights and with DeepSpeed; whole copies of modules (`lora_modules_to_save`) have their dtype.

    A training step holds the input of each layer (gradient checkpointing), and then what autograd saves in one layer,
    times 1.5 for the gradients of those tensors, or the head's buffers, whichever is more. GRPO also generates: then
    the key-value cache, and ZeRO-3's gathered weights, take the activations' place. The cache has the dtype of the
    residual stream: under autocast float32, values too. The head is TRL's fused one, in place as on CUDA; where it is
    trained, it makes its gradient in float32 and casts that to the dtype of the weight. A loss that requires `logits`
    needs those besides.
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


def _check(recipe: dict[str, Any], launcher: Launcher) -> None:
    """Refuse what the arithmetic does not follow."""
    if not str(recipe.get("optim", "adamw_torch")).startswith("adamw_torch"):
        raise LossConfigError(f"the estimate knows AdamW in full precision alone; found optim: {recipe['optim']}")
    for key in UNKNOWN:
        if recipe.get(key):
            raise LossConfigError(f"the estimate does not count what `{key}` changes; found {key}: {recipe[key]}")
    if recipe.get("bf16") is False or recipe.get("attn_implementation") == "eager":
        raise LossConfigError(
            "the estimate is for bf16 and for attention that keeps no table; found bf16: false or eager"
        )
    if _bits(recipe) and launcher.kind not in ("single", "ddp"):
        raise LossConfigError(f"4- and 8-bit weights are estimated on one GPU and under DDP; found {launcher.kind}")
    if _bits(recipe) and not recipe.get("use_peft"):
        raise LossConfigError("4- and 8-bit weights are frozen: an estimate needs `use_peft`")


def _bits(recipe: dict[str, Any]) -> int:
    """4 or 8 where the weights are quantised, 0 where they are not."""
    return 4 if recipe.get("load_in_4bit") else 8 if recipe.get("load_in_8bit") else 0


def estimate(recipe: dict[str, Any], launcher: Launcher, config: PretrainedConfig) -> Estimate:
    """The memory of one GPU.

    Raises:
        LossConfigError: The recipe sets something that the arithmetic does not know.
    """
    _check(recipe, launcher)
    found = Estimate()
    sizes = parameters(config, recipe)
    trained, frozen, every = sizes.trained, sizes.frozen, sizes.trained + sizes.frozen
    head = config.vocab_size * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    width, bits = weight_width(recipe, config), _bits(recipe)
    shards = launcher.gpus if launcher.kind in ("fsdp2", "zero3") else 1
    full = not recipe.get("use_peft")
    if bits:
        # Embeddings and head stay as they are.
        each = NF4[bool(recipe.get("use_bnb_nested_quant"))] if bits == 4 else 1
        found.add("weights", (frozen - embeddings) * each + embeddings * width)
    elif launcher.deepspeed:
        _place(found, launcher, "weights", 2 * (frozen + (trained if full else 0)) / shards)
    else:
        found.add("weights", ((4 if launcher.kind == "fsdp2" else width) * trained * full + width * frozen) / shards)
    adapter = 2 if bits or launcher.deepspeed else 4
    _add_training(found, launcher, sizes, full, adapter=adapter, width=2 if bits else width)
    _add_reference(found, launcher, recipe, every, width)
    if shards > 1 or launcher.offload:
        # Two layers, and as many gradients where they are trained; the units of embedding and head.
        found.add("gathered weights", 2 * sizes.layer * (4 if full else 2) + 2 * embeddings)
    mixed = launcher.kind in ("single", "ddp") and width == 4
    if mixed and full:
        found.add("bf16 copies by autocast", 2 * trained)
    _add_activations(found, launcher, recipe, config, sizes, residual=4 if mixed else 2, adapter=adapter)
    found.add("CUDA", CUDA)
    return found


def _place(found: Estimate, launcher: Launcher, name: str, size: float) -> None:
    """Count a term on the GPU, or on the host if it is offloaded there."""
    if launcher.offload:
        found.host += size * launcher.gpus
    else:
        found.add(name, size)


def _add_training(found: Estimate, launcher: Launcher, sizes: Sizes, full: bool, adapter: int, width: int) -> None:
    """Adapter weights, gradients, optimizer states."""
    name, trained = "" if full else "adapter ", sizes.trained
    if launcher.deepspeed:
        if not full:
            _place(found, launcher, "adapter weights", 2 * trained / (launcher.gpus if launcher.kind == "zero3" else 1))
        _place(found, launcher, f"{name}gradients", 6 * trained / launcher.gpus)
        _place(found, launcher, f"{name}master weights and moments", 12 * trained / launcher.gpus)
        return
    shards = launcher.gpus if launcher.kind == "fsdp2" else 1
    whole = 4 if launcher.kind == "fsdp2" else width
    size = whole * trained if full else adapter * (trained - sizes.copies) + whole * sizes.copies
    if not full:
        found.add("adapter weights", size / shards)
    found.add(f"{name}gradients", size / shards)
    found.add(f"{name}moments", 2 * size / shards)
    if launcher.kind == "ddp" and launcher.gpus > 1:
        found.add(f"{name}buckets of DDP", size)


def _add_reference(found: Estimate, launcher: Launcher, recipe: dict[str, Any], size: int, width: int) -> None:
    """The reference model: with an adapter, or precomputed, there is none."""
    needed = not is_grpo(recipe) or setting(recipe, "beta") != 0.0
    if not needed or recipe.get("use_peft") or (recipe.get("precompute_ref_log_probs") and launcher.kind != "fsdp2"):
        return
    if launcher.deepspeed:
        _place(found, launcher, "reference", 2 * size / (launcher.gpus if launcher.kind == "zero3" else 1))
    elif launcher.kind == "fsdp2":
        # TRL shards it as one unit, so that its forward pass gathers all of it.
        found.add("reference", width * size / launcher.gpus + 2 * size)
    else:
        found.add("reference", width * size)


def sequences(recipe: dict[str, Any]) -> tuple[int, int, int]:
    """Sequences a micro-batch, their length at most, and how many of their tokens the head scores."""
    rows = setting(recipe, "per_device_train_batch_size")
    key = "max_completion_length" if is_grpo(recipe) else "max_length"
    length = setting(recipe, key)
    if length is None:
        raise LossConfigError(f"without a bound on the length there is no estimate: set `{key}`; found null")
    return (rows, PROMPT_TOKENS + length, length) if is_grpo(recipe) else (2 * rows, length, length)


def _add_activations(
    found: Estimate,
    launcher: Launcher,
    recipe: dict[str, Any],
    config: PretrainedConfig,
    sizes: Sizes,
    *,
    residual: int,
    adapter: int,
) -> None:
    """The larger of a training step's and, with GRPO, generation's; without checkpointing all layers are kept."""
    rows, length, scored = sequences(recipe)
    tokens, hidden = rows * length, config.hidden_size
    layer = saved_by_a_layer(config, recipe, residual, tokens, adapter)
    checkpointed = setting(recipe, "gradient_checkpointing")
    kept = config.num_hidden_layers * (residual * tokens * hidden if checkpointed else layer)
    head = min(rows * scored, TILE[0]) * min(config.vocab_size, TILE[1]) * 2 + 4 * rows * scored * hidden
    weight = config.vocab_size * hidden
    if sizes.trains_head:  # its weight's gradient in float32, and cast where the weight is none
        head += 4 * weight + (0 if residual == 4 or launcher.kind == "fsdp2" else 2 * weight)
    if launcher.kind == "fsdp2" and launcher.gpus > 1:
        head += (4 if sizes.trains_head else 2) * weight  # gathered by TRL
    training = {"layer inputs": kept, "a layer or the head at work": max(1.5 * layer, head)}
    bucket = 2 * (hidden**2 if launcher.bucket is None else launcher.bucket)
    if launcher.kind == "zero3":
        found.add("reduce bucket", bucket)
    elif launcher.kind == "zero2":
        training["reduce bucket"] = bucket * (2 if launcher.overlap else 1)
    generation: dict[str, float] = {}
    if recipe.get("use_vllm"):  # holds its share of the GPU all the time, weights included
        found.add("vLLM", setting(recipe, "vllm_gpu_memory_utilization") * GPU)
    elif is_grpo(recipe):
        steps = setting(recipe, "steps_per_generation") or setting(recipe, "gradient_accumulation_steps")
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * residual
        generation["key-value cache"] = rows * steps * length * token
        if launcher.kind == "zero3":
            generation["weights gathered to generate"] = 2 * (sizes.trained + sizes.frozen)
    chosen = max(training, generation, key=lambda terms: sum(terms.values()))
    for name, size in chosen.items():
        found.add(name, size)
