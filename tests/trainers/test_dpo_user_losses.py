"""Losses of one's own: each way of handing them over, and where their hyperparameters come from."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import DPOConfig, TrlParser

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, LossConfigError, PreferenceBatch, PreferenceLoss
from trl_custom_losses.losses.preference.sigmoid import SigmoidLoss

from .parity import assert_identical, assert_same_tensors, build, custom, first_batch, logged, measure, stock, weights

HERE = __name__

SIMPO = """
import torch.nn.functional as F
from trl_custom_losses import PreferenceLoss

class SimPO(PreferenceLoss):
    def __init__(self, *, scale: float = 2.0, margin: float = 1.0):
        super().__init__()
        self.scale, self.margin = scale, margin

    def forward(self, batch, outputs):
        chosen, rejected = (self.scale * outputs.mean_logps).chunk(2)
        return -F.logsigmoid(chosen - rejected - self.margin), {"my_margin": (chosen - rejected).detach()}
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that can be imported during the test; returns its name."""

    def write(source: str) -> str:
        name = f"user_module_{abs(hash((source, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(sys.modules, name, None)  # so that it is forgotten afterwards
        del sys.modules[name]
        return name

    return write


def test_a_loss_of_ten_lines_in_a_file_trains(
    user_module: Callable[[str], str], dense_model: Path, run_arguments: dict
) -> None:
    assert len(SIMPO.strip().splitlines()) <= 15
    loss_function = {"type": f"{user_module(SIMPO)}:SimPO", "margin": 0.5}
    config = run_arguments | {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = custom(dense_model, config, loss_function)

    batch = first_batch(trainer)
    mask = batch["completion_mask"][:, 1:]
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    chosen, rejected = ((logps * mask).sum(1) / mask.sum(1)).chunk(2)
    expected = -F.logsigmoid(2 * (chosen - rejected) - 0.5).mean()
    step = measure(trainer, batch)
    torch.testing.assert_close(step.loss, expected.detach())
    assert step.metrics["my_margin"] == pytest.approx(2 * (chosen - rejected).mean().item(), rel=1e-4)

    start = weights(trainer)
    trainer.train()
    assert max((p - start[name]).abs().max() for name, p in weights(trainer).items()) > 1e-4
    assert "my_margin" in logged(trainer)[-2]


def function(batch: Any, outputs: Any, *, beta: float = 0.7) -> tuple[Tensor, dict[str, Tensor]]:
    chosen, rejected = outputs.log_ratios.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)), {}


def annotated(batch: PreferenceBatch, outputs: Any, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    return function(batch, outputs, beta=beta)


class Plain:
    """Knows nothing of this package."""

    def __init__(self, beta: float = 0.7) -> None:
        self.beta = beta

    def __call__(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return function(batch, outputs, beta=self.beta)


FORMS: dict[str, Any] = {
    "name": "sigmoid",
    "dict": {"type": "sigmoid", "beta": 0.3},
    "JSON": '{"type": "sigmoid", "beta": 0.3}',
    "import path of a function": f"{HERE}:function",
    "import path and hyperparameters": {"type": f"{HERE}:annotated", "beta": 0.3},
    "import path of any class": f"{HERE}:Plain",
    "function": function,
    "annotated function": annotated,
    "lambda": lambda batch, outputs: function(batch, outputs, beta=0.3),
    "partial function": functools.partial(function, beta=0.3),
    "loss object": SigmoidLoss(beta=0.3),
    "any object": Plain(0.3),
    "bound method": Plain(0.3).__call__,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_loss_trains_alike(form: str, dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | {"beta": 0.3, "max_steps": 2, "per_device_train_batch_size": 4}
    expected = stock(dense_model, config | {"optim": "sgd"})
    found = custom(dense_model, config | {"optim": "sgd"}, FORMS[form])
    expected.train()
    found.train()
    assert_same_tensors(weights(found), weights(expected))


@pytest.mark.parametrize("config_class", [DPOConfig, CustomDPOConfig])
@pytest.mark.parametrize("form", ["dict", "function", "loss object"])
def test_the_trainer_argument_works_with_either_config(
    form: str, config_class: type, dense_model: Path, run_arguments: dict
) -> None:
    config = config_class(**run_arguments, beta=0.3)
    found = measure(build(CustomDPOTrainer, dense_model, config, loss_function=FORMS[form]))
    expected = measure(custom(dense_model, run_arguments | {"beta": 0.3}, "sigmoid"))
    assert_identical(found.gradients, expected.gradients)


def test_the_trainer_makes_a_config_where_none_is_given(
    dense_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # the default's bf16
    trainer = CustomDPOTrainer(str(dense_model), train_dataset=tiny.preference_data(), loss_function="sigmoid")
    assert isinstance(trainer.args, CustomDPOConfig)
    assert Path(trainer.args.output_dir).name == "dense-DPO" and trainer.loss_function.beta == 0.1


def test_arguments_may_be_positional_as_in_trl(dense_model: Path, run_arguments: dict) -> None:
    model, reference = tiny.load_model(dense_model), tiny.load_model(dense_model, seed=5)
    config = CustomDPOConfig(**run_arguments, loss_function="sigmoid")
    trainer = CustomDPOTrainer(model, reference, config, None, tiny.preference_data())
    assert trainer.model is model and trainer.ref_model is reference


@pytest.mark.parametrize("text", ["sigmoid", '{"type": "sigmoid", "beta": 0.5}'])
def test_a_command_line_selects_the_loss(text: str, run_arguments: dict) -> None:
    parser = HfArgumentParser(CustomDPOConfig)
    line = ["--output_dir", run_arguments["output_dir"], "--use_cpu", "true", "--bf16", "false"]
    (config,) = parser.parse_args_into_dataclasses([*line, "--loss_function", text])
    assert config.loss_function == ({"type": "sigmoid", "beta": 0.5} if "{" in text else "sigmoid")
    assert config.to_dict()["loss_function"] == config.loss_function


def test_a_recipe_selects_the_loss_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    lines = ["output_dir: run", "use_cpu: true", "bf16: false", "loss_function:", "  type: composed", "  components:"]
    lines += ["    - {type: sigmoid, beta: 0.2}", "    - {type: sft, weight: 0.5}"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    parser = TrlParser((CustomDPOConfig,))
    (config,) = parser.parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])
    assert config.loss_function["components"] == [{"type": "sigmoid", "beta": 0.2}, {"type": "sft", "weight": 0.5}]
    (config,) = parser.parse_args_and_config(
        ["--config", str(tmp_path / "recipe.yaml"), "--loss_function", '{"type": "hinge"}']
    )
    assert config.loss_function == {"type": "hinge"}


class Greedy(PreferenceLoss):
    """Hyperparameters named like fields of the trainer's config."""

    def __init__(
        self,
        *,
        beta: float = 7.0,
        label_smoothing: float = 7.0,
        ld_alpha: float = 7.0,
        warmup_steps: int = 7,
        seed: int = 7,
        learning_rate: float = 7.0,
        max_steps: int = 7,
        weight_decay: float = 7.0,
        own: float = 7.0,
    ) -> None:
        super().__init__()
        for name, value in locals().items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs.logps, {}


BUSY = {"beta": 0.3, "label_smoothing": 0.2, "warmup_steps": 100, "seed": 3, "weight_decay": 0.1, "max_steps": 50}


def test_hyperparameters_fall_back_to_the_trainers_objective_only(dense_model: Path, run_arguments: dict) -> None:
    """The loss's own value, else TRL's field of that name if it is set, else the default; never the optimizer's."""
    trainer = custom(dense_model, run_arguments | BUSY, {"type": f"{HERE}:Greedy", "label_smoothing": 0.4})
    found = trainer.loss_function.hyperparameters()
    assert found == {
        "beta": 0.3,  # the config's
        "label_smoothing": 0.4,  # the loss's own
        "ld_alpha": 7.0,  # None in the config
        "warmup_steps": 7,
        "seed": 7,
        "learning_rate": 7.0,
        "max_steps": 7,
        "weight_decay": 7.0,
        "own": 7.0,
    }
    origins = trainer.loss_function.origins
    assert (origins["beta"], origins["label_smoothing"], origins["seed"]) == (
        "CustomDPOConfig",
        "loss_function",
        "default",
    )


def test_components_fall_back_to_the_config_too(dense_model: Path, run_arguments: dict) -> None:
    components = [{"type": "sigmoid"}, {"type": "hinge", "beta": 0.9}, {"type": f"{HERE}:annotated"}]
    trainer = custom(dense_model, run_arguments | BUSY, {"type": "composed", "components": components})
    assert [leaf.beta for leaf in trainer.loss_function.leaves()] == [0.3, 0.9, 0.3]


def test_the_losss_own_beta_decides_objective_and_rewards(dense_model: Path, run_arguments: dict) -> None:
    expected = measure(stock(dense_model, run_arguments | {"beta": 0.9}))
    found = measure(custom(dense_model, run_arguments | {"beta": 0.3}, {"type": "sigmoid", "beta": 0.9}))
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.metrics["rewards/margins"] == pytest.approx(expected.metrics["rewards/margins"], rel=1e-5)


def test_an_object_keeps_its_own_hyperparameters(dense_model: Path, run_arguments: dict) -> None:
    trainer = custom(dense_model, run_arguments | {"beta": 0.3}, SigmoidLoss(beta=0.8))
    assert trainer.loss_function.beta == 0.8


def test_resolved_hyperparameters_are_logged_once(
    dense_model: Path, run_arguments: dict, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="trl_custom_losses"):
        config = run_arguments | {"beta": 0.3, "max_steps": 1}
        trainer = custom(dense_model, config, {"type": "robust", "label_smoothing": 0.2})
        trainer.train()
    messages = [record.getMessage() for record in caplog.records if record.name == "trl_custom_losses"]
    assert len(messages) == 1
    for part in ("robust", "beta=0.3 (CustomDPOConfig)", "label_smoothing=0.2 (loss_function)"):
        assert part in messages[0]


def test_a_trained_model_is_an_ordinary_one(dense_model: Path, run_arguments: dict, tmp_path: Path) -> None:
    trainer = custom(dense_model, run_arguments | {"max_steps": 1}, "sigmoid")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_identical(dict(loaded.named_parameters()), weights(trainer))
    with pytest.raises(LossConfigError):
        custom(tmp_path / "saved", run_arguments, "grpo")


class Unnumbered:
    """An object whose `beta` is no number."""

    family = "preference"
    beta = None

    def __call__(self, batch, outputs):
        return -outputs.mean_logps.chunk(2)[0], {}


def test_rewards_take_a_beta_that_is_a_number(dense_model, run_arguments):
    trainer = CustomDPOTrainer(
        model=tiny.load_model(dense_model, seed=1),
        ref_model=tiny.load_model(dense_model),
        args=CustomDPOConfig(**run_arguments, beta=0.25, max_steps=1),
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
        loss_function=Unnumbered(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] != 0
