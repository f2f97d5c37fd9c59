"""The end of an optimizer step: what is exchanged and when, and that nothing of a stopped step stays behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from trl_custom_losses import NonFiniteLossError
from trl_custom_losses.callbacks import driver
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.trainers import forward
from trl_custom_losses.trainers.fused_head import fitted_head

from .parity import assert_identical, custom, first_batch, weights
from .test_dpo_features import RUN, Breaks

WIDTH = "_CHUNKED_LOGPROB_CHUNK_SIZE"


class Counts(SigmoidLoss):
    """DPO that observes how many pairs it saw, and hears of it at a step's end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.heard: list[float] = []

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> None:
        self.heard.append(observed["pairs"].item())

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.observe("pairs", outputs.mask.new_tensor(outputs.mask.size(0) // 2))
        return super().forward(batch, outputs)


@contextmanager
def exchanges(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of what is exchanged within."""
    sizes: list[int] = []
    begin = driver.SumOverRanks

    def counted(values: Tensor, accelerator: Any) -> Any:
        sizes.append(values.numel())
        return begin(values, accelerator)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "SumOverRanks", counted)
        yield sizes


# What moves within backward


def test_a_model_that_moves_within_backward_is_stopped_before_it(dense_model: Path, run_arguments: dict) -> None:
    """As layerwise optimizers do, by hooks on parameters."""
    trainer = custom(dense_model, run_arguments | RUN, Breaks(at=2))

    def move(parameter: Tensor) -> None:
        parameter.data.sub_(parameter.grad, alpha=0.01)

    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(move)
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("optimizer", ["galore_adamw_layerwise", "adalomo"])
def test_optimizers_that_move_within_backward_are_known(dense_model: Path, run_arguments: dict, optimizer: str) -> None:
    trainer = custom(dense_model, run_arguments | RUN, "sigmoid")
    assert not trainer._moves_in_backward()
    trainer.args.optim = optimizer
    assert trainer._moves_in_backward()


# Steps


@pytest.mark.parametrize(("accumulation", "pairs"), [(1, [2, 2, 2]), (3, [6, 2, 6])])
def test_a_step_exchanges_once_whatever_the_accumulation(
    accumulation: int, pairs: list[float], dense_model: Path, run_arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Counts()
    trainer = custom(dense_model, run_arguments | RUN | {"gradient_accumulation_steps": accumulation}, loss)
    with exchanges(monkeypatch) as sizes:
        trainer.train()
    assert sizes == [5] * 3  # four numbers ahead, and the observed one
    assert loss.heard == pairs  # an epoch has eight, so that a window may be short


def test_nothing_is_exchanged_where_nobody_wants_to_know(
    dense_model: Path, run_arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = custom(dense_model, run_arguments | RUN | {"stop_on_nonfinite_loss": False}, "sigmoid")
    with exchanges(monkeypatch) as sizes:
        trainer.train()
    assert sizes == []


def test_a_step_that_computes_its_loss_twice_keeps_both_observations(dense_model: Path, run_arguments: dict) -> None:
    loss = Counts()
    trainer = custom(dense_model, run_arguments | RUN, loss)
    once = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (once(*args, **kwargs) + once(*args, **kwargs)) / 2
    trainer.train()
    assert loss.heard == [4.0] * 3


# By hand


def test_a_call_by_hand_exchanges_nothing_and_stops_at_once(
    dense_model: Path, run_arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = custom(dense_model, run_arguments | RUN, Breaks(at=2))
    batch = first_batch(trainer)
    trainer.model.train()
    with exchanges(monkeypatch) as sizes:
        trainer.compute_loss(trainer.model, batch)
        with pytest.raises(NonFiniteLossError, match="Not finite: loss"):
            trainer.compute_loss(trainer.model, batch)
    assert sizes == []
    trainer.train()
    assert trainer.state.global_step == 3


def test_flags_of_an_interrupted_run_are_forgotten(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | RUN | {"gradient_accumulation_steps": 2}
    trainer, healthy = custom(dense_model, config, Breaks(at=1)), custom(dense_model, config, Breaks())
    once = trainer.compute_loss

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        once(*args, **kwargs)
        raise KeyboardInterrupt

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.compute_loss = once
    trainer.train()
    healthy.train()
    assert_identical(weights(trainer), weights(healthy))


def test_a_call_by_hand_within_a_step_leaves_the_steps_flags(dense_model: Path, run_arguments: dict) -> None:
    """The first micro-batch is NaN, a callback calls by hand after it; the stop is the step's own."""
    config = run_arguments | RUN | {"gradient_accumulation_steps": 2}
    trainer = custom(dense_model, config, Breaks(at=1))
    seen: list[bool] = []

    class Calls(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(bool(trainer.compute_loss(trainer.model, first_batch(trainer)).isfinite()))

    trainer.add_callback(Calls())
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        trainer.train()
    assert seen == [True] and trainer.state.global_step == 0


def test_observations_of_two_shapes_are_refused() -> None:
    """Also of two computations of a loss between which the exchange began."""

    class Alone:
        device = torch.device("cpu")

        def reduce(self, values: Tensor, how: str) -> Tensor:
            return values

    loss = Counts()
    loss.observe("pairs", torch.ones(2))
    driver.LossFunctionCallback(loss, Alone()).exchange()
    with pytest.raises(ValueError, match=r"'pairs' in the shapes \(2,\) and \(\)"):
        loss.observe("pairs", torch.ones(()))


# The fused head


def model(vocabulary: int) -> Qwen2ForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, num_key_value_heads=1, **sizes))


@pytest.mark.parametrize(
    ("vocabulary", "width"), [(40, 128), (128, 128), (129, 256), (32_700, 32_768), (40_000, 32_768)]
)
def test_tiles_are_hardly_wider_than_the_vocabulary(vocabulary: int, width: int) -> None:
    stock = getattr(trl_utils, WIDTH)
    with pytest.raises(KeyError), fitted_head(model(vocabulary)):
        assert getattr(trl_utils, WIDTH) == width
        with fitted_head(model(300)):
            assert getattr(trl_utils, WIDTH) == 384
        with fitted_head(model(40_000)):
            assert getattr(trl_utils, WIDTH) == stock, "not that of the training around it"
        raise KeyError
    assert getattr(trl_utils, WIDTH) == stock


def test_a_head_with_more_rows_than_the_config_says_is_one_tile() -> None:
    padded = model(40)
    padded.lm_head = nn.Linear(8, 200, bias=False)
    with fitted_head(padded):
        assert getattr(trl_utils, WIDTH) == 256
    for other in (nn.Linear(2, 2), WithoutVocabulary(PreTrainedConfig())):
        with fitted_head(other):
            assert getattr(trl_utils, WIDTH) == 32_768


class WithoutVocabulary(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config


def test_training_and_evaluation_use_such_tiles_and_the_numbers_stay(dense_model: Path, run_arguments: dict) -> None:
    widths: list[int] = []

    class Looks(SigmoidLoss):
        def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
            widths.append(getattr(trl_utils, WIDTH))
            return super().forward(batch, outputs)

    fitted, wide = (custom(dense_model, run_arguments | RUN, loss) for loss in (Looks(), Looks()))
    wide._fitted_head = nullcontext
    for trainer in (fitted, wide):
        trainer.train()
    fitted.evaluate(fitted.train_dataset)
    evaluations = len(widths) - 6
    assert evaluations > 0 and widths == [128] * 3 + [32_768] * 3 + [128] * evaluations
    assert_identical(weights(fitted), weights(wide))


# Logits


@pytest.mark.parametrize("limit", [1, 50, 700, 2**24])
def test_entropies_do_not_depend_on_the_pieces(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_IN_PASSING", limit)
    logits = torch.randn(3, 5, 40, dtype=torch.float64, requires_grad=True)
    found = forward._entropies(logits)
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(found, -(log_probs.exp() * log_probs).sum(-1))
    assert torch.autograd.gradcheck(forward._entropies, logits.detach()[:, :2, :3].requires_grad_())


@pytest.mark.parametrize("limit", [1, 60, 2**24])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_pooled_states_do_not_depend_on_the_pieces(
    limit: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_IN_PASSING", limit)
    pooling = forward.PolicyForward(nn.Identity(), backbone=None, requires={"pooled_hidden"})
    states = torch.randn(4, 7, 5).to(kind)
    pooling.hidden = states.requires_grad_()
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 3, 1, 0)])
    found = pooling.pooled(mask)
    kept = states.detach().double()[:, 1:] * mask.unsqueeze(-1)
    torch.testing.assert_close(
        found.double(), kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1), rtol=1e-6, atol=1e-6
    )
    found.sum().backward()
    assert states.grad[:, 1:][mask == 0].abs().sum() == 0 and states.grad[0, 1:].abs().min() > 0
