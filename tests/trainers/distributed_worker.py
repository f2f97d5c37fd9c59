"""Runs a list of tiny trainings in one process or, under torchrun, in several; rank 0 writes what came out.

[torchrun --nproc_per_node 2] python -m tests.trainers.distributed_worker MODEL OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from transformers import set_seed
from trl import DPOTrainer, GRPOTrainer

from tests import tiny
from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    CustomGRPOConfig,
    CustomGRPOTrainer,
    PolicyLoss,
)
from trl_custom_losses.callbacks import GradientMonitorCallback
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.trainers.launch import end_rank

GLOBAL_BATCH = 8
STEPS = 3

COMPOSED = {
    "type": "composed",
    "components": [{"type": "sigmoid", "name": "pref"}, {"type": "sft", "name": "sft", "weight": 0.3}],
}


class RandomScale(SigmoidLoss):
    """DPO times a learned factor that starts at random."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.scale = torch.nn.Parameter(1 + 0.1 * torch.randn(()))

    def forward(self, batch, outputs):
        return self.scale.abs() * super().forward(batch, outputs)[0], {}


class RankedLoss(PolicyLoss):
    """Advantage = centred rank of the reward over all completions of the generation batch, on all ranks."""

    def prepare(self, rollout):
        rewards = rollout.rewards.nansum(1)
        ranks = rewards.argsort().argsort().float()
        return {"advantages": (ranks - ranks.mean())[rollout.local]}

    def forward(self, batch, outputs):
        return -batch.advantages * torch.exp(outputs.per_token_logps - outputs.old_per_token_logps), {
            "spread": batch.advantages.squeeze(1).abs()
        }


PAIR = {"pref": {"type": "sigmoid", "beta": 0.5}, "sft": {"type": "sft"}}
COMPONENTS = [{"type": "sigmoid", "name": "pref", "beta": 0.5}, {"type": "sft", "name": "sft", "weight": 0.3}]
POLICIES = [{"type": "grpo", "name": "a"}, {"type": "dapo", "name": "b", "weight": 0.5}]
HIDDEN = {"embedding": "hidden", "similarity_threshold": 0.5}

# Losses whose state moves from what all ranks saw, or that look at all ranks' sequences. `accumulated` variants see the
# same global batch in two micro-batches.
ADAPTIVE: dict[str, dict[str, Any]] = {
    "dpo_trend": {"loss": {"type": "dynamic_multi_objective", "objectives": PAIR, "adaptation_rate": 0.1}},
    "dpo_dwa": {"loss": {"type": "dynamic_multi_objective", "objectives": PAIR, "rule": "dwa", "window": 1}},
    "dpo_softadapt": {
        "loss": {"type": "dynamic_multi_objective", "objectives": PAIR, "rule": "softadapt", "window": 1}
    },
    "dpo_relobralo": {"loss": {"type": "dynamic_multi_objective", "objectives": PAIR, "rule": "relobralo"}},
    "dpo_uncertainty": {"loss": {"type": "dynamic_multi_objective", "objectives": PAIR, "rule": "uncertainty"}},
    "dpo_constraint": {
        "loss": {
            "type": "dynamic_multi_objective",
            "objectives": PAIR,
            "rule": "constraint",
            "targets": {"sft": 2.0},
            "signal": {"sft": "kl"},
        }
    },
    "dpo_balanced": {"loss": {"type": "composed", "components": COMPONENTS, "balancing": "upgrad"}},
    "dpo_mgda": {"loss": {"type": "composed", "components": COMPONENTS, "balancing": "mgda"}},
    "dpo_pcgrad": {"loss": {"type": "composed", "components": COMPONENTS, "balancing": "pcgrad"}},
    "dpo_current": {
        "loss": {"type": "composed", "components": COMPONENTS, "balancing": {"type": "upgrad", "gramian": "current"}}
    },
    "dpo_random": {"loss": {"type": "tests.trainers.distributed_worker:RandomScale"}},
    "dpo_given": {"loss": "an object that each rank made for itself", "given": True},
    "dpo_kl": {"loss": {"type": "adaptive_dpo", "strategy": "kl", "beta": 0.5, "target_kl": 0.5, "horizon": 20}},
    "dpo_lag0": {"loss": {"type": "adaptive_dpo", "strategy": "margin", "beta": 0.5, "lag": 0}},
    "dpo_margin": {"loss": {"type": "adaptive_dpo", "strategy": "margin", "beta": 0.5}},
    "dpo_clipped": {"loss": {"type": "clipped_loss", "base_loss": "sigmoid", "max_grad_norm": 0.02, "per": "sequence"}},
    "dpo_consistency": {
        "loss": {"type": "multi_objective_dpo", "auxiliary_losses": {"consistency": {"threshold": -1.0}}}
    },
    "grpo_uncertainty": {
        "loss": {
            "type": "dynamic_multi_objective",
            "objectives": {"a": {"type": "grpo"}, "b": {"type": "dapo"}},
            "rule": "uncertainty",
        }
    },
    "grpo_balanced": {"loss": {"type": "composed", "components": POLICIES, "balancing": "cagrad"}},
    "grpo_clipped": {"loss": {"type": "clipped_loss", "base_loss": "grpo", "max_grad_norm": 0.01, "per": "sequence"}},
    "grpo_dynamic": {"loss": {"type": "dynamic_grpo", **HIDDEN}},
    "grpo_objectives": {"loss": {"type": "multi_objective_grpo", "quality_weight": 0.1, "diversity_weight": 0.1}},
    "grpo_pairs": {"loss": {"type": "composed_dpo_grpo", "dpo": {"type": "sigmoid", "beta": 0.5}}},
}
# These act on a micro-batch's own neighbours, margin or angles, so they depend on how a batch is accumulated.
COUPLED = ("dpo_consistency", "dpo_current", "dpo_lag0")

# Name -> family, loss (None: TRL's own through its stock trainer), accumulation, LoRA, monitor, further config.
CASES: dict[str, dict[str, Any]] = {
    "dpo_stock": {"family": "dpo", "loss": None},
    "dpo_sigmoid": {"family": "dpo", "loss": "sigmoid"},
    "dpo_sigmoid_accumulated": {"family": "dpo", "loss": "sigmoid", "accumulation": 2},
    "dpo_sft": {"family": "dpo", "loss": "sft"},
    "dpo_sft_accumulated": {"family": "dpo", "loss": "sft", "accumulation": 4},
    "dpo_composed_lora": {"family": "dpo", "loss": COMPOSED, "accumulation": 2, "lora": True},
    "grpo_stock": {"family": "grpo", "loss": None, "config": {"loss_type": "grpo", "beta": 0.1}},
    "grpo_grpo": {"family": "grpo", "loss": "grpo", "config": {"beta": 0.1}},
    "grpo_grpo_accumulated": {"family": "grpo", "loss": "grpo", "accumulation": 2, "config": {"beta": 0.1}},
    "grpo_dapo": {"family": "grpo", "loss": "dapo"},
    "grpo_dapo_accumulated": {"family": "grpo", "loss": "dapo", "accumulation": 4},
    "grpo_dr_grpo_lora": {"family": "grpo", "loss": "dr_grpo", "accumulation": 2, "lora": True},
    "grpo_ranked": {"family": "grpo", "loss": RankedLoss(), "accumulation": 2},
}
for _name, _loss in (("dpo_monitored", COMPONENTS), ("grpo_monitored", POLICIES)):
    for _accumulation in (1, 2):
        CASES[_name if _accumulation == 1 else f"{_name}_accumulated"] = {
            "family": _name.split("_")[0],
            "loss": {"type": "composed", "components": _loss},
            "accumulation": _accumulation,
            "monitor": {"every": 1, "layers": True},
        }
for _name, _case in ADAPTIVE.items():
    CASES[_name] = {"family": _name.split("_")[0], **_case}
    if _name not in COUPLED:
        CASES[f"{_name}_accumulated"] = {**CASES[_name], "accumulation": 2}


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    """Completions that depend on the prompt and the place in the global batch only, not on the number of processes."""
    tokenizer = trainer.processing_class
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for place, prompt in enumerate(prompts, start=first):
        generator = torch.Generator().manual_seed(1000 * sum(map(ord, prompt)) + place)
        length = int(torch.randint(2, 8, (), generator=generator))
        completions.append(torch.randint(3, len(tokenizer), (length,), generator=generator).tolist())
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completions,
        "logprobs": None,
    }


def run(case: dict[str, Any], model_path: Path, output: Path, world: int) -> dict[str, Any]:
    """Train one case; returns logs and final weights."""
    accumulation = case.get("accumulation", 1)
    arguments = {
        **tiny.run_arguments(output / "run"),
        "learning_rate": 1e-2,
        "optim": "sgd",  # so that an equal gradient, not only its sign, makes equal weights
        "max_steps": case.get("steps", STEPS),
        "per_device_train_batch_size": GLOBAL_BATCH // world // accumulation,
        "per_device_eval_batch_size": GLOBAL_BATCH // world,
        "gradient_accumulation_steps": accumulation,
        **case.get("config", {}),
    }
    set_seed(0)
    common: dict[str, Any] = {
        "model": tiny.load_model(model_path, seed=1),
        "processing_class": tiny.tokenizer(),
        "peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if case.get("lora")
        else None,
    }
    if case["loss"] is not None:
        common["loss_function"] = case["loss"]
    if "monitor" in case:
        common["callbacks"] = [GradientMonitorCallback(**case["monitor"])]
    if case.get("given"):
        torch.manual_seed(100 + int(os.environ.get("RANK", "0")))
        common["loss_function"] = RandomScale(beta=0.5)
    if case["family"] == "dpo":
        trainer_type = DPOTrainer if case["loss"] is None else CustomDPOTrainer
        common |= {"train_dataset": tiny.preference_data(32), "eval_dataset": tiny.preference_data(8)}
        trainer = trainer_type(args=CustomDPOConfig(**arguments), **common)
    else:
        trainer_type = GRPOTrainer if case["loss"] is None else CustomGRPOTrainer
        config = CustomGRPOConfig(num_generations=GLOBAL_BATCH, max_completion_length=8, **arguments)
        rewards = [tiny.count_reward, tiny.length_reward]
        answers = tiny.prompt_data(8)
        common |= {
            "train_dataset": answers.add_column("target", answers["answer"]),
            "reward_funcs": rewards,
            "rollout_func": rollout,
        }
        trainer = trainer_type(args=config, **common)
    trainer.train()
    if case["family"] == "dpo":
        trainer.evaluate()
    weights = trained_weights(trainer.model)
    loss = getattr(trainer, "loss_function", None)
    state = {} if loss is None else {name: value.detach().clone() for name, value in loss.state_dict().items()}
    return {"logs": trainer.state.log_history, "weights": weights, "state": state}


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the whole parameters that were trained, by name, on every rank."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with tiny.whole(list(parameters.values())):
        return {name: value.detach().clone() for name, value in parameters.items()}


def main(cases: dict[str, dict[str, Any]] = CASES) -> None:
    """Run every case and write logs (JSON) and weights, from rank 0, and the losses' states, from all."""
    model_path, output = Path(sys.argv[1]), Path(sys.argv[2])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = os.environ.get("RANK", "0")
    results = {name: run(case, model_path, output, world) for name, case in cases.items()}
    torch.save({name: result["state"] for name, result in results.items()}, output / f"state{rank}.pt")
    if rank == "0":
        state = AcceleratorState()
        stage = state.deepspeed_plugin.zero_stage if state.distributed_type == "DEEPSPEED" else None
        (output / "launched.json").write_text(json.dumps([state.distributed_type.value, stage, state.num_processes]))
        (output / "logs.json").write_text(json.dumps({name: result["logs"] for name, result in results.items()}))
        torch.save({name: result["weights"] for name, result in results.items()}, output / "weights.pt")


if __name__ == "__main__":
    main()
    end_rank()
