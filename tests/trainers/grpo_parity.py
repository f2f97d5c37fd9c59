"""Harness: the same micro-batch, or the same run, through TRL's GRPOTrainer and ours."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from trl_custom_losses.trainers import CustomGRPOConfig, CustomGRPOTrainer

from .. import tiny

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")

#: What measures the clock and so differs between two equal runs.
TIMES = ("step_time", "_runtime", "_per_second")

LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)

_SMALL = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8}


@dataclass
class Pair:
    """TRL's trainer and ours with the same policy."""

    stock: GRPOTrainer
    custom: CustomGRPOTrainer

    def __iter__(self):
        return iter((self.stock, self.custom))


def perturb(model: nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """Move every trainable parameter, so that adapters act and the policy differs from its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def build(
    trainer_class: type[GRPOTrainer],
    config_class: type[GRPOConfig],
    model: Path | str,
    run_arguments: Mapping[str, Any],
    *,
    kind: str = "dense",
    perturbed: bool = True,
    trainer: Mapping[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A trainer of a tiny policy.

    Args:
        kind: "dense" trains all weights, "lora" a new adapter, "continued" an adapter that exists already.
        perturbed: Whether the trained weights are moved away from the saved ones.
        trainer: Further arguments of the trainer.
        **config: Further fields of the config.
    """
    arguments: dict[str, Any] = {
        "model": str(model),
        "reward_funcs": [tiny.count_reward, tiny.length_reward],
        "train_dataset": tiny.prompt_data(),
    }
    if kind == "lora":
        arguments["peft_config"] = copy.deepcopy(LORA)
    elif kind == "continued":
        torch.manual_seed(0)
        arguments["model"] = get_peft_model(tiny.load_model(Path(model)), copy.deepcopy(LORA))
        perturb(arguments["model"], seed=3)
    built = trainer_class(
        args=config_class(**{**run_arguments, **_SMALL, **config}), **{**arguments, **(trainer or {})}
    )
    built.current_gradient_accumulation_steps = 1  # the Trainer sets it with the first micro-batch of a step
    if perturbed:
        perturb(built.model)
    return built


def build_custom(model: Path | str, run_arguments: Mapping[str, Any], **options: Any) -> CustomGRPOTrainer:
    """Our trainer alone; `loss_function` may be among the options and goes to the trainer, not to the config."""
    trainer = dict(options.pop("trainer", {}))
    if "loss_function" in options:
        trainer["loss_function"] = options.pop("loss_function")
    return build(CustomGRPOTrainer, CustomGRPOConfig, model, run_arguments, trainer=trainer, **options)


def build_pair(model: Path, run_arguments: Mapping[str, Any], loss: str, **options: Any) -> Pair:
    """Both trainers: TRL's with `loss_type=loss`, ours with `loss_function=loss`."""
    return Pair(
        stock=build(GRPOTrainer, GRPOConfig, model, run_arguments, loss_type=loss, **options),
        custom=build(CustomGRPOTrainer, CustomGRPOConfig, model, run_arguments, loss_function=loss, **options),
    )


def make_inputs(
    trainer: GRPOTrainer,
    *,
    lengths: tuple[int, ...] = (7, 3, 5, 1),
    advantages: str = "sequence",
    old: bool = True,
    sampling: bool = False,
    ratio: str | None = None,
    tool_mask: bool = False,
    masked_rows: tuple[int, ...] = (),
    drift: float = 0.4,
    items: int = 37,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A micro-batch as TRL's trainer hands it to the loss, with garbage wherever a mask must act.

    Args:
        lengths: Tokens of each completion.
        advantages: "sequence" for (B,), "token" for (B, T).
        old: Whether the log-probabilities at generation time are given; they differ from the policy's.
        sampling: Whether the sampler's own are given, one of them NaN.
        ratio: vLLM's ratio, per "token" or per "sequence".
        tool_mask: Whether some tokens come from a tool.
        masked_rows: Completions that are masked as truncated.
        drift: How far the policy is from the one that generated, nats.
        items: Tokens of the generation batch.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = len(tiny.tokenizer())
    batch, width, prompt = len(lengths), max(lengths), 4

    def noise(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    prompt_mask = (torch.arange(prompt) >= torch.arange(batch).unsqueeze(1) % 3).long()  # padded left
    completion_mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    inputs = {
        "prompt_ids": torch.randint(3, vocabulary, (batch, prompt), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, vocabulary, (batch, width), generator=generator) * completion_mask,
        "completion_mask": completion_mask.clone(),
        "num_items_in_batch": torch.tensor(items),
    }
    inputs["completion_mask"][list(masked_rows)] = 0
    if advantages == "sequence":
        inputs["advantages"] = torch.tensor([1.5, -0.7, -1.2, 0.4, 0.0, -2.0])[:batch]
    else:
        inputs["advantages"] = noise(batch, width)
    # Rows 1 and 2 have negative advantages. Row 2 alone has drifted from its generation, and row 1 alone from the
    # sampler, so that an off-policy mask drops either, by what it looks at.
    logps = per_token_logps(trainer, inputs)
    rows = torch.tensor([-0.4, -0.5, 1.0, -0.5, 1.0, 1.0])[:batch].unsqueeze(1) * drift
    garbage = 3 * noise(batch, width) * (1 - completion_mask)
    if tool_mask:
        inputs["tool_mask"] = torch.ones(batch, width, dtype=torch.long)
        inputs["tool_mask"][0, 2:5] = inputs["tool_mask"][1, 1] = inputs["tool_mask"][2, 0] = 0
        garbage = garbage + 9 * (1 - inputs["tool_mask"])
    if old:
        inputs["old_per_token_logps"] = logps + rows + noise(batch, width, scale=drift) + garbage
    inputs["ref_per_token_logps"] = logps + noise(batch, width, scale=0.3) + garbage
    if sampling:
        inputs["sampling_per_token_logps"] = logps - rows + noise(batch, width, scale=drift) + garbage
        inputs["sampling_per_token_logps"][0, 1] = torch.nan  # a token that vLLM could not score
    if ratio is not None:
        inputs["importance_sampling_ratio"] = noise(batch, width if ratio == "token" else 1, scale=0.5).exp()
    return inputs


@torch.no_grad()
def per_token_logps(trainer: GRPOTrainer, inputs: Mapping[str, Tensor]) -> Tensor:
    """The policy's log-probabilities of the completion tokens, from TRL's own forward."""
    return trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1),
        torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1),
        inputs["completion_ids"].size(1),
    )[0]


def loss_and_gradients(
    trainer: GRPOTrainer, inputs: Mapping[str, Any], mode: str = "train"
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss of one micro-batch and the gradient of every parameter (None where none arrived)."""
    trainer.model.train(mode == "train")
    trainer.model.zero_grad(set_to_none=True)
    before = {name: value.clone() for name, value in inputs.items()}
    with torch.set_grad_enabled(mode == "train"):
        loss = trainer.compute_loss(trainer.model, inputs)
    if mode == "train":
        loss.backward()
    assert inputs.keys() == before.keys(), "the micro-batch is used again in the next iteration"
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in inputs.items())
    return loss.detach(), {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def logged(trainer: GRPOTrainer) -> dict[str, Any]:
    """What the trainer logs now."""
    trainer.log({})
    return trainer.state.log_history[-1]


def assert_parity(pair: Pair, inputs: Mapping[str, Any], mode: str = "train") -> dict[str, Any]:
    """Equal loss, gradients and log of one micro-batch; returns what TRL logged."""
    (loss, gradients), (found_loss, found) = (loss_and_gradients(trainer, inputs, mode) for trainer in pair)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-7)
    assert_gradients(found, gradients)
    metrics, found_metrics = (logged(trainer) for trainer in pair)
    assert_logs([found_metrics], [metrics])
    return metrics


def assert_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Equal gradients, parameter by parameter; `atol` is relative to the largest."""
    assert found.keys() == expected.keys()
    assert [n for n in found if found[n] is None] == [n for n in expected if expected[n] is None]
    present = {name: gradient for name, gradient in expected.items() if gradient is not None}
    largest = max((gradient.abs().max().item() for gradient in present.values()), default=0.0)
    for name, gradient in present.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol * largest, msg=lambda m, n=name: n + m)


def assert_logs(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    """Equal histories: every entry, every key, every value except times; bit for bit with a tolerance of 0."""
    assert len(found) == len(expected)
    for entry, reference in zip(map(without_times, found), map(without_times, expected), strict=True):
        assert entry.keys() == reference.keys()
        for key, value in reference.items():
            if tolerance == 0 or not isinstance(value, float):
                assert entry[key] == value or (value != value and entry[key] != entry[key]), key
            else:
                assert math.isclose(entry[key], value, rel_tol=tolerance, abs_tol=tolerance / 10), (key, entry, value)


def without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A log entry without what the clock decides."""
    return {key: value for key, value in entry.items() if not key.endswith(TIMES)}


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
    """Completions that depend on the prompt and on their number among that prompt's, and on nothing else."""
    tokens = trainer.processing_class
    output: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    seen: Counter[str] = Counter()
    for prompt in prompts:
        source = random.Random(f"{prompt}|{seen[prompt]}")
        seen[prompt] += 1
        completion = [source.randrange(3, len(tokens)) for _ in range(source.randint(1, 8))]
        if source.random() < 0.6:
            completion[-1] = tokens.eos_token_id
        output["prompt_ids"].append(tokens(prompt)["input_ids"])
        output["completion_ids"].append(completion)
        output["logprobs"].append([-4 * source.random() for _ in completion])
    return output


def tool_rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
    """As `rollout`, with every third token coming from the environment."""
    output = rollout(prompts, trainer)
    output["env_mask"] = [[int(i % 3 != 1) for i in range(len(ids))] for ids in output["completion_ids"]]
    return output


def weights(trainer: GRPOTrainer) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def numbered_prompts(rows: int = 8) -> Dataset:
    """Prompts that say which row they are, with columns that say the same."""
    return Dataset.from_list([{"prompt": f"{i}=", "weight": i + 0.5, "answer": f"row {i}"} for i in range(rows)])
