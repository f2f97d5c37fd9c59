"""The memory estimate: what it counts, and that the recipes' headers hold what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_custom_losses import LossConfigError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import estimate_memory  # noqa: E402
from memory_arithmetic import GB, NF4, Launcher, estimate  # noqa: E402
from model_sizes import MODELS, lora_config, parameters, saved_by_a_layer  # noqa: E402

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


def unrounded(recipe: dict, launcher: Launcher) -> dict[str, float]:
    """All terms, also those that are too small to be shown."""
    import memory_arithmetic

    terms: dict[str, float] = {}
    original = memory_arithmetic.Estimate.add
    memory_arithmetic.Estimate.add = lambda self, name, size: terms.__setitem__(name, terms.get(name, 0) + size)
    try:
        estimate(recipe, launcher, SMALL)
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
        8 * sum(eight[name] for name in ("weights", "gradients")) + 12 * 8 * eight["weights"] / 2
    )


def test_what_the_arithmetic_does_not_know_is_an_error():
    with pytest.raises(LossConfigError, match="adafactor"):
        estimate({**DPO, "optim": "adafactor"}, Launcher(), SMALL)
    with pytest.raises(LossConfigError, match="zero3"):
        estimate({**DPO, **LORA, "load_in_4bit": True}, Launcher("zero3", False, 8), SMALL)
    with pytest.raises(LossConfigError, match="launcher"):
        Launcher.read(None, 8)


def test_the_script_prints_a_table_whose_terms_add_up(capsys):
    recipe = ROOT / "recipes" / "dpo" / "composed_smollm2-135m_lora.yaml"
    estimate_memory.main([str(recipe), "--launcher", str(ROOT / "recipes/accelerate/ddp.yaml"), "--gpus", "2"])
    *terms, total = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert total == pytest.approx(sum(terms), abs=0.001)
    found = estimate(yaml.safe_load(recipe.read_text()), Launcher("ddp", False, 2), next(iter(MODELS.values())))
    assert total == found.total and found.terms["weights"] == 2 * 134_515_008 and total < 8 * GB
