"""A vision-language model: images reach the model as in TRL, and losses and gradients are TRL's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, CustomGRPOConfig, CustomGRPOTrainer, PreferenceLoss

_SIDE, _PATCH = 8, 4  # pixels
_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = _TEMPLATE
    images = CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})
    return LlavaProcessor(
        images, tokenizer, patch_size=_PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_TEMPLATE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a random Llava model of a few thousand weights, with its processor."""
    torch.manual_seed(0)
    made = processor()
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = made.tokenizer
    text = Qwen2Config(
        **layers, num_key_value_heads=2, vocab_size=len(tokens), pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id, bos_token_id=None, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, image_size=_SIDE, patch_size=_PATCH),
        text_config=text,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=(_SIDE // _PATCH) ** 2,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("models") / "vision"
    LlavaForConditionalGeneration(config).save_pretrained(path)
    made.save_pretrained(path)
    return path


def load(path: Path) -> LlavaForConditionalGeneration:
    """The saved model, perturbed away from its reference."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 255, (_SIDE, _SIDE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs() -> Dataset:
    return Dataset.from_list(
        [
            {
                "images": [picture(i)],
                "prompt": message("user", f"what is {i}?"),
                "chosen": message("assistant", "a" * (i + 1)),
                "rejected": message("assistant", "no"),
                "weight": float(i),
            }
            for i in range(4)
        ]
    )


def gradients(trainer, inputs) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(stock, ours, inputs) -> None:
    (loss, expected), (found_loss, found) = gradients(stock, inputs), gradients(ours, inputs)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert any("vision" in name and grad.abs().max() > 0 for name, grad in expected.items()), "images had no effect"
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6 * largest)


def test_dpo_on_images_equals_trl(vision_model, run_arguments):
    common = {"train_dataset": pairs(), "processing_class": processor()}
    stock = DPOTrainer(load(vision_model), args=DPOConfig(**run_arguments), **common)
    config = CustomDPOConfig(**run_arguments, loss_function="sigmoid")
    ours = CustomDPOTrainer(load(vision_model), args=config, **common)
    inputs = next(iter(stock.get_train_dataloader()))
    assert "pixel_values" in inputs
    assert_same(stock, ours, inputs)


def test_columns_reach_a_loss_on_images(vision_model, run_arguments):
    class Weighted(PreferenceLoss):
        columns = ("weight",)
        seen: list = []

        def forward(self, batch, model_outputs):
            self.seen.append(batch["weight"])
            return batch["weight"] * -model_outputs.logps.chunk(2)[0], {}

    config = CustomDPOConfig(**run_arguments, max_steps=1, per_device_train_batch_size=4)
    common = {"train_dataset": pairs(), "processing_class": processor()}
    CustomDPOTrainer(load(vision_model), args=config, loss_function=Weighted(), **common).train()
    assert sorted(Weighted.seen[0].tolist()) == [0, 1, 2, 3]


def test_grpo_on_images_equals_trl(vision_model, run_arguments):
    prompts = Dataset.from_list(
        [{"images": [picture(i)], "prompt": message("user", f"what is {i}?")} for i in range(4)]
    )
    options = {**run_arguments, "num_generations": 4, "max_completion_length": 6, "beta": 0.1}

    def reward(completions, **kwargs):
        return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]

    common = {"reward_funcs": reward, "train_dataset": prompts, "processing_class": processor()}
    stock = GRPOTrainer(load(vision_model), args=GRPOConfig(**options, loss_type="grpo"), **common)
    ours = CustomGRPOTrainer(load(vision_model), args=CustomGRPOConfig(**options, loss_function="grpo"), **common)
    for trainer in (stock, ours):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set by the training loop
    inputs = stock._prepare_inputs(next(iter(stock.get_train_dataloader())))
    assert "pixel_values" in inputs
    assert_same(stock, ours, inputs)
