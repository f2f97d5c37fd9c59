"""The memory estimate: what it counts, and that the recipes' headers hold what it says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, PretrainedConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicLayer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_custom_losses import LossConfigError
from trl_custom_losses.trainers import launch

from . import tiny

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import estimate_memory  # noqa: E402
from memory_arithmetic import BUCKET, GB, NF4, Launcher, estimate, sequences  # noqa: E402
from model_sizes import MODELS, lora_config, parameters, saved_by_a_layer, setting  # noqa: E402

RECIPES = [path for path in sorted(ROOT.glob("recipes/*po/*.yaml")) if "# Memory: " in path.read_text()]
LORA = {"use_peft": True, "lora_target_modules": "all-linear"}
SMALL = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
)
DPO = {"per_device_train_batch_size": 2, "max_length": 128, "dtype": "float32"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_figures_of_a_header_are_those_of_the_script(recipe):
    text = recipe.read_text()
    assert estimate_memory.with_figures(text) == text


def test_the_table_of_the_readme_has_the_figures_of_the_headers():
    rows = re.findall(
        r"^\| `(\w+/\S+qwen3\S+)` \|.*\| ([\d./ ]+) \|$", (ROOT / "recipes/README.md").read_text(), re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(
        f"{path.parent.name}/{path.stem}" for path in RECIPES if "qwen3" in path.stem
    )
    for name, shown in rows:
        header = re.findall(r"^#   ([\d.]+) GB = ", (ROOT / f"recipes/{name}.yaml").read_text(), re.MULTILINE)
        for figure in shown.split(" / "):
            assert min(abs(float(figure) - float(exact)) for exact in header) < 0.051, name


def test_there_are_recipes_with_figures():
    assert len(RECIPES) >= 20


@pytest.mark.parametrize(
    "name, count", [("SmolLM2-135M-Instruct", 134_515_008), ("Qwen3-0.6B", 596_049_920), ("Qwen3-8B", 8_190_735_360)]
)
def test_the_models_have_their_published_sizes(name, count):
    config = next(config for path, config in MODELS.items() if path.endswith(f"/{name}"))
    assert parameters(config, {})[:2] == (count, 0)
    # r (in + out) for each of the seven matrices of a layer.
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = 16 * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner))
    assert parameters(config, LORA)[0] == config.num_hidden_layers * layer


def test_weights_gradients_and_moments_are_those_of_a_real_training_step():
    model = Qwen3ForCausalLM(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    real = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "moments": sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim()),
    }
    found = unrounded({**DPO}, Launcher())
    for name, size in real.items():
        assert found[name] == size, name
    assert found["reference"] == real["weights"]


def unrounded(recipe: dict, launcher: Launcher, config: PretrainedConfig = SMALL) -> dict[str, float]:
    """All terms, also those that are too small to be shown."""
    import memory_arithmetic

    terms: dict[str, float] = {}
    original = memory_arithmetic.Estimate.add
    memory_arithmetic.Estimate.add = lambda self, name, size: terms.__setitem__(name, terms.get(name, 0) + size)
    try:
        estimate(recipe, launcher, config)
    finally:
        memory_arithmetic.Estimate.add = original
    return terms


def test_an_adapter_is_as_large_as_that_of_peft():
    model = get_peft_model(Qwen3ForCausalLM(SMALL).to(torch.bfloat16), lora_config(LORA))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    found = unrounded({**DPO, **LORA, "dtype": "bfloat16"}, Launcher())
    assert (found["adapter weights"], found["adapter moments"], found["weights"]) == (trained, 2 * trained, frozen)
    assert "reference" not in found


@pytest.mark.parametrize("tokens", [48, 200])
def test_what_a_layer_keeps_is_counted_for_other_lengths(tokens):
    """The line through two short inputs gives what autograd keeps of a longer one."""
    model = Qwen3ForCausalLM(SMALL).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hidden = torch.randn(1, tokens, 32, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.model.layers[0](hidden, position_embeddings=rotary)
    real = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    assert saved_by_a_layer(SMALL, {}, 4, tokens) == pytest.approx(real, rel=0.02)


def test_sharding_divides_and_quantization_shrinks():
    one, eight = (unrounded({**DPO, "dtype": "bfloat16"}, Launcher("zero3", False, gpus)) for gpus in (1, 8))
    for name in ("weights", "gradients", "master weights and moments", "reference"):
        assert eight[name] == pytest.approx(one[name] / 8)
    whole = unrounded({**DPO, **LORA, "dtype": "bfloat16"}, Launcher())["weights"]
    small = unrounded({**DPO, **LORA, "dtype": "bfloat16", "load_in_4bit": True}, Launcher())["weights"]
    embeddings = 2 * SMALL.vocab_size * SMALL.hidden_size
    assert small - embeddings == pytest.approx((whole - embeddings) * NF4[False] / 2)
    offloaded = estimate({**DPO, "dtype": "bfloat16"}, Launcher("zero3", True, 8), SMALL)
    assert offloaded.host == pytest.approx(
        8 * sum(eight[name] for name in ("weights", "gradients", "reference")) + 12 * 8 * eight["weights"] / 2
    )
    assert "reference" not in unrounded({**DPO, "dtype": "bfloat16"}, Launcher("zero3", True, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_has_the_bytes_that_a_generation_under_autocast_has(dtype, dense_model, tmp_path, monkeypatch):
    cached: dict[DynamicLayer, float] = {}
    update = DynamicLayer.update

    def watched(self: DynamicLayer, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = update(self, *args, **kwargs)
        cached[self] = (self.keys.nbytes + self.values.nbytes) / (self.keys.size(0) * self.keys.size(2))
        return found

    monkeypatch.setattr(DynamicLayer, "update", watched)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.prompt_data()))
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "dtype": dtype}
    more = {"model_name_or_path": dense_model, "dataset_name": tmp_path / "data.jsonl", "output_dir": tmp_path / "out"}
    more |= {"use_cpu": "true", "bf16": "true", "max_steps": 1, "report_to": "none", "disable_tqdm": "true"}
    more |= {"loss_function": "grpo", "reward_funcs": "tests.tiny.count_reward"}
    launch.train_grpo([word for key, value in (options | more).items() for word in (f"--{key}", str(value))])
    config = AutoConfig.from_pretrained(dense_model)
    steps = 4096  # so many answers that their cache is larger than a training step's activations
    recipe = {**options, "gradient_accumulation_steps": steps}
    rows, length, _ = sequences(recipe)
    each = unrounded(recipe, Launcher(), config)["key-value cache"] / (steps * rows * length)
    # A generation makes a cache of its own, with as many layers as the model has.
    assert sum(list(cached.values())[-config.num_hidden_layers :]) == each


def test_the_reduce_bucket_of_deepspeed_is_counted():
    recipe = {**DPO, "dtype": "bfloat16"}
    for kind in ("zero2", "zero3"):
        assert unrounded(recipe, Launcher(kind, False, 8))["reduce bucket"] == 2 * BUCKET
        auto = Launcher.read(ROOT / f"recipes/deepspeed/{kind}.json", 8)
        buffers = 2 if kind == "zero2" else 1
        assert unrounded(recipe, auto)["reduce bucket"] == buffers * 2 * SMALL.hidden_size**2
        assert Launcher.read(ROOT / f"recipes/accelerate/{kind}.yaml", 8) == Launcher(kind, False, 8)
    assert "reduce bucket" not in unrounded(recipe, Launcher("ddp", False, 8))


def test_zero2_has_no_bucket_while_it_generates():
    recipe = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 512}
    long = {**recipe, "gradient_accumulation_steps": 4096, "dtype": "bfloat16"}
    assert "reduce bucket" in unrounded({**long, "gradient_accumulation_steps": 1}, Launcher("zero2", False, 8))
    assert "reduce bucket" not in unrounded(long, Launcher("zero2", False, 8))
    assert unrounded(long, Launcher("zero3", False, 8))["reduce bucket"] == 2 * BUCKET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_makes_a_gradient_in_float32_and_casts_it(dtype, monkeypatch):
    """What TRL's fused head holds of its weight's gradient: one tensor in float32, and one more in another dtype."""
    made: list[int] = []
    weight = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    zeros, to = torch.zeros, torch.Tensor.to

    def cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = to(self, *args, **kwargs)
        made.extend([found.nbytes] if found.shape == weight.shape and found is not self else [])
        return found

    def allocated(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = zeros(*args, **kwargs)
        made.extend([found.nbytes] if found.shape == weight.shape else [])
        return found

    hidden = torch.randn(5, 32, dtype=dtype, requires_grad=True)
    logps = ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(5), 1.0, 16)[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", allocated)
        patch.setattr(torch.Tensor, "to", cast)
        logps.sum().backward()
    full = {**DPO, "per_device_train_batch_size": 1, "max_length": 1, "gradient_checkpointing": False}
    wide = Qwen3Config(**{**SMALL.to_dict(), "vocab_size": 100_000, "tie_word_embeddings": False})
    name = str(dtype).removeprefix("torch.")
    heads = [
        unrounded({**full, "dtype": name, **more}, Launcher(), wide)["a layer or the head at work"]
        for more in ({}, LORA)
    ]
    assert heads[0] - heads[1] == sum(made) / weight.numel() * 100_000 * 32


def test_adapters_in_bfloat16_leave_less_to_autograd():
    counted = {**DPO, **LORA, "dtype": "bfloat16", "gradient_checkpointing": False}
    four = unrounded({**counted, "load_in_4bit": True}, Launcher())["layer inputs"]
    zero = unrounded(counted, Launcher("zero3", False, 8))["layer inputs"]
    wide = unrounded(counted, Launcher())["layer inputs"]
    tokens = 2 * 2 * 128
    layers = [SMALL.num_hidden_layers * saved_by_a_layer(SMALL, LORA, 2, tokens, adapter) for adapter in (2, 4)]
    assert [four, zero, wide] == [layers[0], layers[0], layers[1]] and layers[0] < layers[1]


def test_copies_of_modules_are_trained_in_their_own_dtype():
    wanted = {**LORA, "lora_modules_to_save": ["lm_head"]}
    model = get_peft_model(Qwen3ForCausalLM(SMALL).to(torch.bfloat16), lora_config(wanted))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    found = unrounded({**DPO, **wanted, "dtype": "bfloat16"}, Launcher("ddp", False, 2))
    assert [found[f"adapter {name}"] for name in ("weights", "gradients", "buckets of DDP")] == [trained] * 3
    assert found["adapter moments"] == 2 * trained
    sizes = parameters(SMALL, wanted)
    assert (sizes.copies, sizes.trains_head, parameters(SMALL, LORA).trains_head) == (64 * 32, True, False)


def test_eight_bits_are_a_byte():
    plain, eight = (
        unrounded({**DPO, **LORA, "dtype": "bfloat16", "load_in_8bit": bits}, Launcher()) for bits in (False, True)
    )
    embeddings = 2 * SMALL.vocab_size * SMALL.hidden_size
    assert eight["weights"] - embeddings == (plain["weights"] - embeddings) / 2
    assert eight["adapter weights"] == plain["adapter weights"] / 2


def test_what_a_recipe_leaves_out_is_trls_default():
    short = {"dtype": "float32"}
    assert [setting(short, key) for key in ("max_length", "per_device_train_batch_size")] == [1024, 8]
    assert sequences(short) == (16, 1024, 1024)
    assert unrounded(short, Launcher()) == unrounded(
        {**DPO, "per_device_train_batch_size": 8, "max_length": 1024}, Launcher()
    )
    answers = setting({"reward_funcs": ["x"]}, "max_completion_length")
    assert sequences({"reward_funcs": ["x"]}) == (8, 256 + answers, answers)
    assert "reference" not in unrounded({"reward_funcs": ["x"]}, Launcher())
    assert unrounded({}, Launcher())["weights"] == 4 * parameters(SMALL, {}).trained


def test_dtype_auto_is_that_of_the_models_config():
    for config in MODELS.values():
        assert config.dtype == torch.bfloat16
    known = Qwen3Config(**{**SMALL.to_dict(), "dtype": "bfloat16"})
    found = unrounded({**DPO, "dtype": "auto"}, Launcher(), known)
    assert found == unrounded({**DPO, "dtype": "bfloat16"}, Launcher())
    with pytest.raises(LossConfigError, match="auto"):
        estimate({**DPO, "dtype": "auto"}, Launcher(), SMALL)


@pytest.mark.parametrize("key", ["activation_offloading", "fp16", "use_liger_kernel", "lora_target_parameters"])
def test_keys_that_no_term_follows_are_refused(key):
    estimate({**DPO, key: False}, Launcher(), SMALL)
    with pytest.raises(LossConfigError, match=key):
        estimate({**DPO, key: True}, Launcher(), SMALL)


def test_what_the_arithmetic_does_not_know_is_an_error(tmp_path):
    with pytest.raises(LossConfigError, match="adafactor"):
        estimate({**DPO, "optim": "adafactor"}, Launcher(), SMALL)
    with pytest.raises(LossConfigError, match="zero3"):
        estimate({**DPO, **LORA, "load_in_4bit": True}, Launcher("zero3", False, 8), SMALL)
    with pytest.raises(LossConfigError, match="zero3"):
        estimate({**DPO, **LORA, "load_in_8bit": True}, Launcher("zero3", False, 8), SMALL)
    with pytest.raises(LossConfigError, match="use_peft"):
        estimate({**DPO, "load_in_8bit": True}, Launcher(), SMALL)
    with pytest.raises(LossConfigError, match="max_length"):
        estimate({**DPO, "max_length": None}, Launcher(), SMALL)
    with pytest.raises(LossConfigError, match="bf16"):
        estimate({**DPO, "bf16": False}, Launcher(), SMALL)
    with pytest.raises(LossConfigError, match="launcher"):
        Launcher.read(None, 8)
    settings = json.loads((ROOT / "recipes/deepspeed/zero3_offload.json").read_text())
    del settings["zero_optimization"]["offload_param"]
    (tmp_path / "half.json").write_text(json.dumps(settings))
    with pytest.raises(LossConfigError, match=r"half.json with stage 3, optimizer states on cpu and weights on none"):
        Launcher.read(tmp_path / "half.json", 8)


def test_the_script_prints_a_table_whose_terms_add_up(capsys):
    recipe = ROOT / "recipes" / "dpo" / "composed_smollm2-135m_lora.yaml"
    estimate_memory.main([str(recipe), "--launcher", str(ROOT / "recipes/accelerate/ddp.yaml"), "--gpus", "2"])
    *terms, total = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert total == pytest.approx(sum(terms), abs=0.001)
    found = estimate(yaml.safe_load(recipe.read_text()), Launcher("ddp", False, 2), next(iter(MODELS.values())))
    assert total == found.total and found.terms["weights"] == 2 * 134_515_008 and total < 8 * GB
