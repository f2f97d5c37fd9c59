"""Adapters that were trained before: found, loaded, compared with the right reference, saved, resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PromptTuningConfig
from trl import ModelConfig

from tests import tiny
from trl_custom_losses import LossConfigError
from trl_custom_losses.trainers import CustomDPOConfig, CustomDPOTrainer, launch

from .adapters import (
    KINDS,
    LOG_2,
    ON_CPU,
    dpo_by_hand,
    from_folder,
    lora,
    parameters_of,
    save_adapter,
    sums,
    trained,
    with_reference,
    words,
)
from .grpo_parity import build_custom, rollout
from .parity import assert_identical, composed, first_batch, weights
from .test_grpo_requirements import PullsToReference

ROOT = Path(__file__).parents[2]
CONFIGS = {name: lambda options=options: lora(**options) for name, options in KINDS.items()} | {
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture
def adapter(dense_model: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", dense_model)


def dpo(model: Any, run_arguments: dict, loss: Any = "sigmoid", **config: Any) -> CustomDPOTrainer:
    """A trainer on a model object."""
    settings = run_arguments | {"max_steps": 2, "per_device_train_batch_size": 8} | config
    return CustomDPOTrainer(
        model, args=CustomDPOConfig(**settings, loss_function=loss), train_dataset=tiny.preference_data()
    )


def first_loss(trainer: Any) -> float:
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_script_trains_an_adapter_further_from_itself(
    loss: str, adapter: Path, dense_model: Path, tmp_path: Path
) -> None:
    start = parameters_of(from_folder(dense_model, adapter), "default")
    trainer = launch.train_dpo(
        words(tmp_path, adapter, tiny.preference_data(), steps=3, loss_function=loss, learning_rate=0.01)
    )
    # A policy that is its reference: -log sigmoid(0), (0 - 1 / (2 beta))^2.
    assert first_loss(trainer) == pytest.approx({"sigmoid": LOG_2, "ipo": 25.0}[loss], rel=1e-6)
    assert_identical(parameters_of(trainer.model, "ref"), {n.replace("default", "ref"): p for n, p in start.items()})
    moved = parameters_of(trainer.model, "default")
    assert all(not torch.equal(moved[name], p) for name, p in start.items())
    frozen = [n for n, p in trainer.model.named_parameters() if not p.requires_grad]
    assert not any("default" in name for name in frozen) and any("ref" in name for name in frozen)
    saved = tmp_path / "out"
    assert (saved / "adapter_model.safetensors").exists() and not (saved / "model.safetensors").exists()
    assert_identical(parameters_of(from_folder(dense_model, saved), "default"), moved)


def test_what_was_trained_further_is_trained_further_again(adapter: Path, dense_model: Path, tmp_path: Path) -> None:
    """The copy "ref" that is saved beside the adapter is not what the next run starts from or compares with."""
    arguments = {"loss_function": "sigmoid", "learning_rate": 0.01}
    data = tiny.preference_data()
    first = launch.train_dpo(words(tmp_path, adapter, data, steps=2, **arguments))
    assert (tmp_path / "out" / "ref").is_dir()
    again = launch.train_dpo(
        words(tmp_path, tmp_path / "out", data, steps=1, output_dir=tmp_path / "again", **arguments)
    )
    assert first_loss(again) == pytest.approx(LOG_2, rel=1e-6)
    end = parameters_of(first.model, "default")
    assert_identical(parameters_of(again.model, "ref"), {n.replace("default", "ref"): p for n, p in end.items()})


def test_grpo_trains_an_adapter_further_with_its_start_as_reference(
    adapter: Path, dense_model: Path, tmp_path: Path
) -> None:
    options = {"loss_function": "grpo", "beta": 0.3, "learning_rate": 0.01, "max_completion_length": 8}
    options |= {"reward_funcs": "tests.tiny.count_reward", "num_generations": 2, "per_device_train_batch_size": 4}
    trainer = launch.train_grpo(words(tmp_path, adapter, tiny.prompt_data(), steps=2, **options))
    kl = [record["kl"] for record in trainer.state.log_history if "kl" in record]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-6
    start = parameters_of(from_folder(dense_model, adapter), "default")
    assert_identical(
        parameters_of(trainer.model, "ref"), {name.replace("default", "ref"): p for name, p in start.items()}
    )
    saved = from_folder(dense_model, tmp_path / "out")
    assert_identical(parameters_of(saved, "default"), parameters_of(trainer.model, "default"))


def test_a_new_adapter_on_an_adapter_is_refused_with_what_to_do(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(LossConfigError, match=r"(?s)`use_peft`.*adapter already.*leave `use_peft` out.*merge_adapter"):
        launch.train_dpo(words(tmp_path, adapter, tiny.preference_data(), use_peft="true"))


@pytest.mark.parametrize(
    ("base", "message"), [("", "does not name a base model"), ("gone/away", r"'gone/away'.*could not be loaded")]
)
def test_an_adapter_whose_base_cannot_be_had_says_so(
    base: str, message: str, adapter: Path, dense_model: Path, tmp_path: Path
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace(str(dense_model), base))
    with pytest.raises(LossConfigError, match=message):
        launch.train_dpo(words(tmp_path, adapter, tiny.preference_data()))


def test_type_attention_and_tokenizer_are_those_asked_for(adapter: Path, dense_model: Path, tmp_path: Path) -> None:
    tokens = tiny.tokenizer()
    tokens.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokens.add_tokens(["<new>"])
    tokens.save_pretrained(adapter)
    training = CustomDPOConfig(str(tmp_path), use_cpu=True, bf16=False, loss_function="sigmoid")
    found = launch.load_model(ModelConfig(str(adapter), dtype="bfloat16", attn_implementation="eager"), training)
    model = found["model"]
    assert set(found) == {"model", "processing_class"} and training.model_init_kwargs is None
    assert model.get_base_model().config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert found["processing_class"].chat_template == tokens.chat_template
    assert model.get_input_embeddings().num_embeddings == len(tokens), "no room for the tokens that were added"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / file).unlink()
    assert launch.load_model(ModelConfig(str(adapter)), training)["processing_class"] is None  # TRL takes the base's


def test_a_revision_of_a_hub_adapter_is_that_revision(dense_model: Path, tmp_path: Path) -> None:
    """From a hub cache on the disk, without a network; the base is taken at its own revision."""
    for revision, seed in (("1" * 40, 2), ("2" * 40, 3)):
        folder = tmp_path / "models--someone--adapter"
        save_adapter(folder / "snapshots" / revision, dense_model, seed=seed)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / {2: "main", 3: "second"}[seed]).write_text(revision)
    program = f"""
import torch
from trl import ModelConfig
from trl_custom_losses.trainers import CustomDPOConfig, launch
from trl_custom_losses.trainers.continued import find_adapter
from tests.trainers.adapters import from_folder, parameters_of
from pathlib import Path
training = CustomDPOConfig({str(tmp_path)!r}, use_cpu=True, bf16=False, loss_function="sigmoid")
for name, number in (("main", "1"), ("second", "2")):
    model = launch.load_model(ModelConfig("someone/adapter", model_revision=name), training)["model"]
    folder = Path({str(folder)!r}) / "snapshots" / (40 * number)
    expected = parameters_of(from_folder(Path({str(dense_model)!r}), folder), "default")
    found = parameters_of(model, "default")
    assert all(torch.equal(found[name], p) for name, p in expected.items()), name
assert find_adapter("someone/nothing") is None
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_first_step_compares_an_adapter_with_itself(
    kind: str, precompute: bool, dense_model: Path, run_arguments: dict
) -> None:
    """Whatever the adapter is made of; TRL's copy leaves out what is kept in parameter dictionaries."""
    model = trained(dense_model, CONFIGS[kind]())
    trainer = dpo(model, run_arguments, precompute_ref_log_probs=precompute, learning_rate=0.05)
    before = parameters_of(trainer.model, "ref")
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if "ref" in name.split("."))
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[0] == pytest.approx(LOG_2, rel=1e-6)
    assert abs(losses[1] - LOG_2) > 1e-4, "nothing was trained"
    assert before
    assert_identical(parameters_of(trainer.model, "ref"), before)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("loss", ["sigmoid", composed(["sigmoid", "sft"], [1.0, 0.0])], ids=["sigmoid", "composed"])
@pytest.mark.parametrize("rank", [4, 2])
def test_a_reference_adapter_that_the_model_brings_is_the_reference(
    rank: int, loss: Any, precompute: bool, dense_model: Path, tmp_path: Path, run_arguments: dict
) -> None:
    model = with_reference(dense_model, tmp_path / "reference", lora(r=rank))
    before = parameters_of(model, "ref")
    trainer = dpo(model, run_arguments, loss, precompute_ref_log_probs=precompute)
    assert "add_adapter" not in model.__dict__ and "named_parameters" not in model.__dict__
    batch = first_batch(trainer)
    policy, reference = (
        sums(each.eval(), batch) for each in (trained(dense_model), from_folder(dense_model, tmp_path / "reference"))
    )
    with model.disable_adapter():
        base = sums(model.eval(), batch)
    expected = dpo_by_hand(policy, reference)
    assert (expected - dpo_by_hand(policy, base)).abs() > 1e-2 < (expected - LOG_2).abs()
    trainer.train()
    assert first_loss(trainer) == pytest.approx(expected.item(), rel=1e-5)
    assert_identical(parameters_of(trainer.model, "ref"), before)


def test_a_reference_adapter_reaches_grpo_as_reference(dense_model: Path, tmp_path: Path, run_arguments: dict) -> None:
    """As the KL term's at beta > 0, and for a loss that asks for it at beta = 0."""
    folder = tmp_path / "reference"
    kl = []
    for beta, loss in ((0.3, PullsToReference()), (0.0, PullsToReference())):
        model = with_reference(dense_model, folder)
        options = {"trainer": {"model": model, "rollout_func": rollout}, "perturbed": False, "max_steps": 1}
        trainer = build_custom(dense_model, run_arguments, loss_function=loss, beta=beta, **options)
        trainer.train()
        batch, outputs = loss.seen[0]
        reference, mask = from_folder(dense_model, folder), batch.mask.bool()
        ids = torch.cat((batch.prompt_ids, batch.completion_ids), dim=1)
        attention = torch.cat((batch.prompt_ids != tiny.tokenizer().pad_token_id, mask), dim=1).long()
        with torch.no_grad():
            logits = reference(input_ids=ids, attention_mask=attention).logits[:, :-1]
        expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -mask.size(1) :][mask]
        torch.testing.assert_close(outputs.ref_per_token_logps[mask], expected, rtol=1e-4, atol=1e-5)
        assert (outputs.per_token_logps[mask] - expected).abs().max() > 1e-2
        difference = expected - outputs.per_token_logps.detach()[mask]
        kl.append((difference.exp() - difference - 1).mean().item())
        records = [record["kl"] for record in trainer.state.log_history if "kl" in record]
        assert records == ([pytest.approx(kl[0], rel=1e-4)] if beta else [])


def test_composed_dpo_grpo_sees_a_reference_adapter_at_beta_0(
    dense_model: Path, tmp_path: Path, run_arguments: dict
) -> None:
    """Its DPO part is log 2 when the reference equals the policy, and only then."""
    losses = []
    for other in (False, True):
        model = trained(dense_model)
        save_adapter(tmp_path / "same", dense_model, seed=7 if other else 2)
        model.load_adapter(str(tmp_path / "same"), "ref")
        trainer = build_custom(
            dense_model,
            run_arguments,
            loss_function={"type": "composed_dpo_grpo"},
            beta=0.0,
            perturbed=False,
            trainer={"model": model, "rollout_func": rollout},
            max_steps=1,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["dpo_loss"])
    assert losses[0] == pytest.approx(LOG_2, rel=1e-5)
    assert abs(losses[1] - LOG_2) > 1e-3


@pytest.mark.parametrize("active", ["ref", "other"])
def test_a_reference_adapter_beside_a_wrongly_named_one_is_refused(
    active: str, dense_model: Path, run_arguments: dict
) -> None:
    model = trained(dense_model)
    model.add_adapter("ref", lora())
    model.add_adapter("other", lora())
    model.set_adapter(active)
    with pytest.raises(LossConfigError, match=rf"'default'.*active: \['{active}'\]"):
        dpo(model, run_arguments)


@pytest.mark.parametrize("brought", [False, True], ids=["copy", "given"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    brought: bool, dense_model: Path, tmp_path: Path, run_arguments: dict
) -> None:
    """Weights, reference and the state of a loss that keeps one."""
    loss = {"type": "adaptive_dpo", "strategy": "margin", "beta": 0.2}
    config = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "learning_rate": 1e-2}
    config |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"}

    def start() -> CustomDPOTrainer:
        model = with_reference(dense_model, tmp_path / "reference") if brought else trained(dense_model)
        return dpo(model, run_arguments, loss, **config)

    whole, resumed = start(), start()
    whole.train()
    assert whole.loss_function.state_dict()
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-2"))
    assert resumed.state.global_step == 5
    assert_identical(weights(resumed), weights(whole))
    assert_identical(parameters_of(resumed.model, "ref"), parameters_of(whole.model, "ref"))
    assert_identical(resumed.loss_function.state_dict(), whole.loss_function.state_dict())
    losses = [[r["loss"] for r in trainer.state.log_history if "loss" in r] for trainer in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_script_resumes_a_continued_adapter(adapter: Path, tmp_path: Path) -> None:
    options = {"loss_function": "sigmoid", "learning_rate": 0.01, "save_steps": 2, "per_device_train_batch_size": 4}
    line = words(tmp_path, adapter, tiny.preference_data(), steps=4, **options)
    line[line.index("--save_strategy") + 1] = "steps"
    whole = launch.train_dpo(line)
    resumed = launch.train_dpo([*line, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")])
    assert_identical(parameters_of(resumed.model, "default"), parameters_of(whole.model, "default"))
    assert_identical(parameters_of(resumed.model, "ref"), parameters_of(whole.model, "ref"))
    assert ON_CPU[0] in line
