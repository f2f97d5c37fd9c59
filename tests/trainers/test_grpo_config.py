"""Mistakes are reported before a model loads; hyperparameters that are left out come from the trainer's config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from torch import Tensor
from trl import GRPOConfig, TrlParser

from trl_custom_losses import LossConfigError, ModelOutputs, PolicyBatch, PolicyLoss
from trl_custom_losses.losses.policy import GRPOLoss, VESPOLoss
from trl_custom_losses.reductions import FixedLengthMean
from trl_custom_losses.trainers import CustomGRPOConfig, CustomGRPOTrainer

from .. import tiny
from .grpo_parity import build, build_custom

NO_MODEL = "/nonexistent/model"


class NeedsColumns(PolicyLoss):
    columns = ("weight", "answr")

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        raise AssertionError("never called")


class NeedsANumber(PolicyLoss):
    def __init__(self, *, temper: float, epsilon: float = 0.7) -> None:
        super().__init__()
        self.temper, self.epsilon = temper, epsilon


class NeedsTheMoon(PolicyLoss):
    requires = frozenset({"pooled_hiden"})


PATH = f"{__name__}:NeedsANumber"

# Loss -> what the message must say.
MISTAKES: dict[str, tuple[Any, list[str]]] = {
    "unknown name": ("grpoo", ["'grpoo'", "did you mean 'grpo'"]),
    "wrong family": ("sigmoid", ["'sigmoid'", "preference loss", "GRPO trainer"]),
    "wrong family in a composition": (
        {"type": "composed", "components": [{"type": "grpo"}, {"type": "sigmoid"}]},
        ["'sigmoid'", "preference loss"],
    ),
    "unknown hyperparameter": ({"type": "grpo", "epsilom": 0.1}, ["'epsilom'", "did you mean 'epsilon'", "grpo("]),
    "ill-typed hyperparameter": ({"type": "grpo", "epsilon": "0.1"}, ["'epsilon'", "float", "'0.1'"]),
    "hyperparameter out of range": ({"type": "grpo", "delta": -1.0}, ["'delta'", "> 0", "-1.0"]),
    "ill-typed level": (
        {"type": "grpo", "importance_sampling_level": "word"},
        ["'importance_sampling_level'", "'token' | 'sequence'", "'word'"],
    ),
    "missing hyperparameter": (PATH, ["'temper'", "temper: float"]),
    "beta of the trainer": ({"type": "grpo", "beta": 0.1}, ["'beta'", "KL", "in the trainer's config"]),
    "no type": ({"epsilon": 0.1}, ["'type'"]),
    "no module": ("no_such_module:Loss", ["no_such_module"]),
    "no attribute": (f"{__name__}:NeedsANumbr", ["NeedsANumbr", "did you mean 'NeedsANumber'"]),
    "no JSON": ('{"type": "grpo",', ["JSON"]),
    "no component": ({"type": "composed", "components": []}, ["component"]),
    "same name twice": ({"type": "composed", "components": [{"type": "grpo"}, {"type": "grpo"}]}, ["'grpo'", "name"]),
    "mistake in a component": (
        {"type": "composed", "components": [{"type": "grpo", "beta": 0.1}]},
        ["'beta'", "in the trainer's config"],
    ),
    "unknown need": (f"{__name__}:NeedsTheMoon", ["'pooled_hiden'", "did you mean 'pooled_hidden'"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("where", ["config", "trainer"])
def test_mistake_is_reported_before_a_model_loads(run_arguments: dict, mistake: str, where: str) -> None:
    loss, parts = MISTAKES[mistake]
    with pytest.raises(LossConfigError) as error:
        if where == "config":
            CustomGRPOConfig(**run_arguments, loss_function=loss)
        else:
            arguments = {
                "args": GRPOConfig(**run_arguments),
                "train_dataset": tiny.prompt_data(),
                "loss_function": loss,
            }
            CustomGRPOTrainer(NO_MODEL, tiny.count_reward, **arguments)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset", "one of several", "iterable", "generated"])
def test_missing_column_is_reported_before_a_model_loads(run_arguments: dict, which: str) -> None:
    good = tiny.prompt_data().rename_column("answer", "answr")
    bad = tiny.prompt_data()
    arguments = {"train_dataset": good, "eval_dataset": good}
    name = which
    if which == "one of several":
        name, arguments["eval_dataset"] = "eval_dataset['b']", {"a": good, "b": bad}
    elif which == "iterable":
        name, arguments["train_dataset"] = "train_dataset", bad.to_iterable_dataset()
    elif which == "generated":
        name, arguments["train_dataset"] = "train_dataset", IterableDataset.from_generator(lambda: iter(bad))
    else:
        arguments[which] = bad
    with pytest.raises(LossConfigError) as error:
        CustomGRPOTrainer(
            NO_MODEL, tiny.count_reward, args=GRPOConfig(**run_arguments), loss_function=NeedsColumns(), **arguments
        )
    for part in ("'answr'", name, "did you mean 'answer'", "prompt"):
        assert part in str(error.value)


def test_loss_function_excludes_loss_type(run_arguments: dict) -> None:
    with pytest.raises(LossConfigError, match="loss_type='grpo'"):
        CustomGRPOConfig(**run_arguments, loss_function="grpo", loss_type="grpo")
    config = GRPOConfig(**run_arguments, loss_type="vespo")
    with pytest.raises(LossConfigError, match="loss_type='vespo'"):
        CustomGRPOTrainer(NO_MODEL, args=config, train_dataset=tiny.prompt_data(), loss_function="grpo")


def test_loss_function_is_given_once(run_arguments: dict) -> None:
    config = CustomGRPOConfig(**run_arguments, loss_function="grpo")
    with pytest.raises(LossConfigError, match="given twice"):
        CustomGRPOTrainer(NO_MODEL, args=config, train_dataset=tiny.prompt_data(), loss_function="dapo")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate"])
def test_vespo_refuses_vllm_ratios_per_sequence(run_arguments: dict, mode: str, nested: bool) -> None:
    loss: Any = {"type": "composed", "components": [{"type": "grpo"}, {"type": "vespo"}]} if nested else "vespo"
    options = {**run_arguments, "use_vllm": True, "vllm_importance_sampling_mode": mode}
    with pytest.raises(LossConfigError, match=f"'vespo'.*'token_truncate'.*{mode!r}"):
        CustomGRPOConfig(**options, loss_function=loss)
    with pytest.raises(LossConfigError, match="'VESPOLoss'"):
        CustomGRPOTrainer(
            NO_MODEL, args=GRPOConfig(**options), train_dataset=tiny.prompt_data(), loss_function=VESPOLoss()
        )
    CustomGRPOConfig(**options, vllm_importance_sampling_correction=False, loss_function=loss)
    CustomGRPOConfig(**{**options, "vllm_importance_sampling_mode": "token_mask"}, loss_function=loss)


@pytest.mark.parametrize("config_class", [GRPOConfig, CustomGRPOConfig])
def test_left_out_hyperparameters_are_the_configs(
    dense_model: Path, run_arguments: dict, config_class: type[GRPOConfig]
) -> None:
    fields = {"epsilon": 0.11, "epsilon_high": 0.33, "delta": 1.7, "importance_sampling_level": "sequence"}
    trainer = build(
        CustomGRPOTrainer,
        config_class,
        dense_model,
        run_arguments,
        trainer={"loss_function": {"type": "dr_grpo", "epsilon": 0.22}},
        max_completion_length=23,
        **fields,
    )
    loss = trainer.loss_function
    assert loss.hyperparameters() == {**fields, "epsilon": 0.22, "max_completion_length": 23}
    assert loss.reduction == FixedLengthMean(23)
    assert loss.origins["epsilon"] == "loss_function"
    assert loss.origins["delta"] == config_class.__name__


def test_fields_that_are_none_leave_the_losss_default(dense_model: Path, run_arguments: dict) -> None:
    loss = build_custom(dense_model, run_arguments, loss_function="grpo", epsilon=0.15).loss_function
    assert (loss.epsilon, loss.epsilon_high, loss.delta) == (0.15, None, None)
    assert loss.origins["delta"] == loss.origins["epsilon_high"] == "default"


def test_a_hyperparameter_that_is_given_as_none_is_not_the_configs(dense_model: Path, run_arguments: dict) -> None:
    settings = {"type": "grpo", "delta": None}
    loss = build_custom(dense_model, run_arguments, loss_function=settings, delta=3.0).loss_function
    assert loss.delta is None


def test_components_fall_back_to_the_config_too(run_arguments: dict, dense_model: Path) -> None:
    settings = {
        "type": "composed",
        "components": [{"type": "grpo", "epsilon": 0.4}, {"type": "vespo"}, {"type": PATH, "temper": 2}],
    }
    config = {"epsilon": 0.3, "vespo_k_pos": 1.25, "temperature": 0.5}
    trainer = build_custom(dense_model, run_arguments, loss_function=settings, **config)
    grpo, vespo, own = trainer.loss_function.leaves()
    assert (grpo.epsilon, vespo.vespo_k_pos, own.epsilon, own.temper) == (0.4, 1.25, 0.3, 2.0)


def test_training_arguments_are_no_hyperparameters(dense_model: Path, run_arguments: dict) -> None:
    """A loss's own `warmup_steps` has nothing to do with the optimizer's."""

    def loss(batch: PolicyBatch, outputs: ModelOutputs, *, warmup_steps: int = 7, seed: int = 5) -> tuple[Tensor, dict]:
        raise AssertionError("never called")

    trainer = build_custom(dense_model, run_arguments, loss_function=loss, warmup_steps=3)
    assert trainer.loss_function.hyperparameters() == {"warmup_steps": 7, "seed": 5}


def test_a_loss_object_keeps_its_hyperparameters(dense_model: Path, run_arguments: dict) -> None:
    loss = GRPOLoss(epsilon=0.4)
    trainer = build_custom(dense_model, run_arguments, loss_function=loss, epsilon=0.1, epsilon_high=0.2)
    assert trainer.loss_function is loss
    assert (loss.epsilon, loss.epsilon_high) == (0.4, None)


@pytest.mark.parametrize("value", ["dapo", '{"type": "grpo", "epsilon": 0.3}'], ids=["name", "json"])
def test_the_loss_is_chosen_on_a_command_line(tmp_path: Path, value: str) -> None:
    options = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (config,) = TrlParser((CustomGRPOConfig,)).parse_args_and_config([*options, "--loss_function", value])
    assert config.loss_function == (json.loads(value) if value.startswith("{") else value)


def test_the_loss_is_chosen_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nuse_cpu: true\nbf16: false\nloss_function:\n  type: grpo\n  epsilon: 0.3\n")
    (config,) = TrlParser((CustomGRPOConfig,)).parse_args_and_config(["--config", str(path)])
    assert config.loss_function == {"type": "grpo", "epsilon": 0.3}


def test_trl_arguments_may_be_given_by_position(dense_model: Path, run_arguments: dict) -> None:
    config = CustomGRPOConfig(**run_arguments, loss_function="cispo", per_device_train_batch_size=8)
    trainer = CustomGRPOTrainer(str(dense_model), tiny.count_reward, config, tiny.prompt_data())
    assert trainer.loss_function.name == "cispo"
    assert trainer.args is config
    stock = GRPOConfig(**run_arguments, per_device_train_batch_size=8)
    assert trainer.args.loss_type == trainer.loss_type == stock.loss_type
