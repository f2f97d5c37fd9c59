from __future__ import annotations

import math

import pytest
import torch

from trl_custom_losses import LossConfigError, LossFunctionRegistry, Metric, ModelOutputs, PreferenceBatch
from trl_custom_losses.losses.auxiliary import PerplexityLoss
from trl_custom_losses.losses.preference import SFTLoss
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.summaries import summarise
from trl_custom_losses.testing import random_data


def _data() -> tuple[PreferenceBatch, ModelOutputs]:
    """Two pairs; the chosen completions have 1 and 3 tokens, the rejected ones 2 and 3."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    logps = torch.tensor([[-1.0, 9, 9], [-2, -3, -4], [-5, -6, 9], [-7, -8, -9]]).requires_grad_()
    ids = torch.zeros(4, 4, dtype=torch.long)
    return PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask), ModelOutputs(per_token_logps=logps, mask=mask)


@pytest.mark.parametrize(
    ("completions", "expected"), [("chosen", (1 + 2 + 3 + 4) / 4), ("both", (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9) / 9)]
)
def test_is_the_mean_over_all_tokens(completions: str, expected: float) -> None:
    batch, outputs = _data()
    loss = PerplexityLoss(completions=completions)
    assert reduce_loss(loss, loss(batch, outputs)[0], batch).item() == pytest.approx(expected)


def test_both_raises_the_rejected_completions_too() -> None:
    batch, outputs = _data()
    loss = PerplexityLoss(completions="both")
    (gradient,) = torch.autograd.grad(reduce_loss(loss, loss(batch, outputs)[0], batch), outputs.per_token_logps)
    torch.testing.assert_close(gradient, -batch.mask / 9)


def test_of_the_chosen_completions_it_is_sft() -> None:
    data = random_data("preference")
    denominators = data.denominators(ranks=2, micro_batches=3)
    assert torch.equal(data.loss(PerplexityLoss(), denominators), data.loss(SFTLoss(), denominators))
    assert torch.equal(data.gradient(PerplexityLoss(), denominators), data.gradient(SFTLoss(), denominators))


@pytest.mark.parametrize("completions", ["chosen", "both"])
def test_reports_the_perplexity_of_all_tokens_of_several_micro_batches(completions: str) -> None:
    """Sums and counts add up before the exponential is taken, so that the split does not matter."""
    data = random_data("preference", size=5)
    total = count = 0.0
    for part in ([0], [1, 2, 3], [4]):
        batch, outputs = data.take(part).build(PerplexityLoss())
        metrics = PerplexityLoss(completions=completions)(batch, outputs)[1]
        assert isinstance(metrics["perplexity"], Metric)
        value, tokens, per, reduce = summarise(metrics, batch.mask, "perplexity")["perplexity"]
        assert (per, reduce) == ("log", "exp")
        total, count = total + value.item(), count + tokens.item()
    rows = slice(0, 5 if completions == "chosen" else 10)
    logps, mask = data.rows["logps"][rows], data.rows["mask"][rows]
    expected = math.exp(-(logps * mask).sum().item() / mask.sum().item())
    assert math.exp(total / count) == pytest.approx(expected, rel=1e-12)


def test_sft_reports_nothing_and_takes_no_option() -> None:
    assert SFTLoss()(*_data())[1] == {}
    with pytest.raises(LossConfigError, match="no hyperparameter 'completions'"):
        LossFunctionRegistry.build({"type": "sft", "completions": "both"})


def test_refuses_other_completions() -> None:
    with pytest.raises(LossConfigError, match=r"'completions': expected 'chosen' \| 'both', found 'rejected'"):
        PerplexityLoss(completions="rejected")
