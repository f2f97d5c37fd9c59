"""Options of the configs that meet a loss: honoured, refused or pointed out, never silently dropped."""

from __future__ import annotations

import logging

import pytest
from accelerate import ParallelismConfig

from tests import tiny
from tests.trainers.grpo_parity import assert_parity, build_pair, make_inputs
from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    CustomGRPOConfig,
    CustomGRPOTrainer,
    LossConfigError,
    PolicyLoss,
)
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.trainers.config import build_loss


def simpo(batch, outputs, *, beta: float = 2.0):
    """A loss whose default is not the config's."""
    chosen, rejected = (beta * outputs.mean_logps).chunk(2)
    return rejected - chosen, {}


def dpo(model, arguments, loss, **options):
    return CustomDPOTrainer(
        model=tiny.load_model(model),
        args=CustomDPOConfig(**arguments, **options),
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
        loss_function=loss,
    )


def test_a_config_default_in_place_of_the_losss_own_is_pointed_out(dense_model, run_arguments, caplog):
    trainer = dpo(dense_model, run_arguments, simpo)
    assert trainer.loss_function.beta == 0.1  # the config's field comes first
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "beta=0.1" in warning and "not the loss's own 2.0" in warning


def test_nothing_is_pointed_out_where_the_config_says_it(dense_model, run_arguments, caplog):
    assert dpo(dense_model, run_arguments, simpo, beta=0.2).loss_function.beta == 0.2
    dpo(dense_model, run_arguments, "sigmoid")
    assert not [record for record in caplog.records if record.levelno == logging.WARNING and "beta" in record.message]


def test_a_config_option_that_a_given_object_does_not_follow_is_pointed_out(dense_model, run_arguments, caplog):
    dpo(dense_model, run_arguments, SigmoidLoss(beta=0.3), f_divergence_type="forward_kl")
    assert "the given object has f_divergence_type='reverse_kl'" in caplog.text
    assert "beta=0.3 (the given object)" in caplog.text


@pytest.mark.parametrize("config_type", [CustomDPOConfig, CustomGRPOConfig])
def test_sequence_parallelism_is_refused(run_arguments, config_type):
    config = config_type(**run_arguments)
    config.parallelism_config = ParallelismConfig(cp_size=2)
    with pytest.raises(LossConfigError, match="parallelism"):
        build_loss("sigmoid" if config_type is CustomDPOConfig else "grpo", config)


@pytest.mark.parametrize("loss, warns", [("grpo", False), ("dapo", True)])
def test_trls_advice_is_about_the_loss_in_use(dense_model, run_arguments, capfd, caplog, loss, warns):
    trainer = CustomGRPOTrainer(
        model=tiny.load_model(dense_model),
        reward_funcs=tiny.count_reward,
        args=CustomGRPOConfig(**run_arguments, loss_function=loss, importance_sampling_level="sequence"),
        train_dataset=tiny.prompt_data(),
        processing_class=tiny.tokenizer(),
    )
    assert ("loss sums per-token" in caplog.text + capfd.readouterr().err) == warns
    assert trainer.args.loss_type == trainer.loss_type == "dapo"


@pytest.mark.parametrize("loss", ["dapo", "cispo", "vespo"])
def test_few_valid_tokens_keep_trls_normaliser(dense_model, run_arguments, loss):
    """The scaled denominator may be below 1; only the count itself is held at 1."""
    pair = build_pair(dense_model, run_arguments, loss, steps_per_generation=8, gradient_accumulation_steps=1)
    inputs = make_inputs(pair.stock, masked_rows=(0, 1, 2))
    inputs["num_items_in_batch"] = inputs["num_items_in_batch"].new_tensor(3)
    assert_parity(pair, inputs)


def test_metrics_of_a_loss_stand_beside_those_of_the_trainer(dense_model, run_arguments):
    class Shadows(PolicyLoss):
        def forward(self, batch, model_outputs):
            metrics = {"rewards/count_reward/mean": 99.0, "completions/mean_length": -1.0}
            return -batch.advantages * model_outputs.per_token_logps, metrics

    trainer = CustomGRPOTrainer(
        model=tiny.load_model(dense_model),
        reward_funcs=tiny.count_reward,
        args=CustomGRPOConfig(**run_arguments, max_steps=1, max_completion_length=4),
        train_dataset=tiny.prompt_data(),
        processing_class=tiny.tokenizer(),
        loss_function=Shadows(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["completions/mean_length"] == 4
    assert 0 <= logged["rewards/count_reward/mean"] <= 1
    assert logged["Shadows/completions/mean_length"] == -1


def test_hyperparameters_named_as_general_training_options_are_no_matter(dense_model, run_arguments, caplog):
    class Odd(SigmoidLoss):
        def __init__(self, *, device: str = "cpu", seed: int = 7) -> None:
            super().__init__()
            self.device, self.seed = device, seed

    dpo(dense_model, run_arguments, Odd())
    assert not [record for record in caplog.records if record.levelno == logging.WARNING and "Odd" in record.message]


def test_a_function_of_no_family_is_a_component_too(monkeypatch, tmp_path, run_arguments):
    (tmp_path / "plain_losses.py").write_text(
        "def plain(batch, outputs, *, scale: float = 1.0):\n    return -scale * outputs.logps, {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"type": "composed", "components": [{"type": "plain_losses:plain", "name": "a"}]}
    assert build_loss(config, CustomDPOConfig(**run_arguments)).leaves()[0].scale == 1.0
