"""Merging an adapter: the merged model is the adapter's model, complete, and mistakes end in one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_custom_losses import LossConfigError

from . import tiny
from .trainers.adapters import KINDS, from_folder, lora, save_adapter

SCRIPT = Path(__file__).parents[1] / "scripts" / "merge_adapter.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    ids = torch.randint(3, 46, (3, 9))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_the_adapter_does(
    kind: str, script: ModuleType, dense_model: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", dense_model, lora(**KINDS[kind]))
    script.main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    assert not list((tmp_path / "merged").glob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = logits(from_folder(dense_model, adapter))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (logits(tiny.load_model(dense_model)) - expected).abs().max() > 0.1, "the adapter does nothing"


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head shares the weights of its input embeddings."""
    folder = tiny.save_model(tmp_path_factory.mktemp("tied") / "model")
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "targets", ["all-linear", ["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]]
)
def test_tied_weights_merge_too(targets: Any, script: ModuleType, tied_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tied_model, lora(target_modules=targets))
    script.main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == (targets == "all-linear")
    expected = logits(from_folder(tied_model, adapter))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (logits(tiny.load_model(tied_model)) - expected).abs().max() > 0.1, "the adapter does nothing"


def test_tokenizer_and_chat_template_are_the_adapters_or_else_the_bases(
    script: ModuleType, dense_model: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", dense_model)
    tokens = tiny.tokenizer()
    tokens.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokens.save_pretrained(adapter)
    script.merge(str(adapter), tmp_path / "one")
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == tokens.chat_template
    for file in adapter.glob("*token*"):
        file.unlink()
    script.merge(str(adapter), tmp_path / "two")
    found = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert found.chat_template is None and found.get_vocab() == tokens.get_vocab()


def test_the_type_is_the_bases_or_the_one_asked_for(
    script: ModuleType, dense_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter = save_adapter(tmp_path / "adapter", dense_model)
    assert script.merge(str(adapter), tmp_path / "one").dtype == torch.float32
    assert script.merge(str(adapter), tmp_path / "two", dtype="bfloat16").dtype == torch.bfloat16
    assert "loaded without quantisation (torch.bfloat16)" in capsys.readouterr().out


def test_an_adapter_of_a_base_that_is_stored_in_4_bits_is_merged_into_plain_weights(
    script: ModuleType, dense_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(dense_model, quantization_config=config, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", dense_model)
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace(str(dense_model), str(tmp_path / "base")))
    script.merge(str(adapter), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert all(p.is_floating_point() for p in merged.parameters())
    assert not hasattr(merged.config, "quantization_config")
    expected = logits(PeftModel.from_pretrained(base, str(adapter)).train())
    torch.testing.assert_close(logits(merged), expected, rtol=2e-2, atol=2e-2)


def test_pushing_uploads_model_and_tokenizer(
    script: ModuleType, dense_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []
    for kind in (script.PreTrainedModel, type(tiny.tokenizer())):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, name: pushed.append((type(self).__name__, name)))
    adapter = save_adapter(tmp_path / "adapter", dense_model)
    script.main(["--adapter", str(adapter), "--output", str(tmp_path / "quiet")])
    assert pushed == []
    script.main(["--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--push_to_hub", "me/model"])
    assert len(pushed) == 2 and pushed[0] == ("Qwen2ForCausalLM", "me/model") and pushed[1][1] == "me/model"


def test_a_folder_without_an_adapter_ends_the_program_with_one_line(dense_model: Path, tmp_path: Path) -> None:
    words = ["--adapter", str(dense_model), "--output", str(tmp_path / "merged")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: '{dense_model}' holds no adapter" in done.stderr
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused(script: ModuleType, dense_model: Path, tmp_path: Path) -> None:
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", dense_model, prompt)
    with pytest.raises(LossConfigError, match="PROMPT_TUNING"):
        script.merge(str(adapter), tmp_path / "merged")
    adapter = save_adapter(tmp_path / "other", dense_model)
    with pytest.raises(LossConfigError, match="not an empty folder"):
        script.merge(str(adapter), tmp_path / "adapter")
