from __future__ import annotations

import pytest
import torch

from trl_custom_losses import ModelOutputs, PreferenceBatch
from trl_custom_losses.losses.preference import SFTLoss
from trl_custom_losses.reductions import reduce_loss


def _data() -> tuple[PreferenceBatch, ModelOutputs]:
    """Two pairs; the chosen completions have 1 and 3 tokens."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    logps = torch.tensor([[-1.0, 9, 9], [-2, -3, -4], [-5, -6, 9], [-7, -8, -9]]).requires_grad_()
    ids = torch.zeros(4, 4, dtype=torch.long)
    return PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask), ModelOutputs(per_token_logps=logps, mask=mask)


def test_is_the_mean_over_all_chosen_tokens() -> None:
    batch, outputs = _data()
    value = reduce_loss(SFTLoss(), SFTLoss()(batch, outputs)[0], batch)
    assert value.item() == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_raises_every_chosen_token_alike_and_leaves_rejected_alone() -> None:
    batch, outputs = _data()
    value = reduce_loss(SFTLoss(), SFTLoss()(batch, outputs)[0], batch)
    (gradient,) = torch.autograd.grad(value, outputs.per_token_logps)
    assert gradient[:2].tolist() == [[-0.25, 0, 0], [-0.25, -0.25, -0.25]]
    assert not gradient[2:].any()


def test_needs_no_reference() -> None:
    assert not SFTLoss.requires


def test_pair_weights_act_by_their_mean() -> None:
    batch, outputs = _data()
    batch.pair_weights = torch.tensor([0.2, 0.6])
    value = reduce_loss(SFTLoss(), SFTLoss()(batch, outputs)[0], batch)
    assert value.item() == pytest.approx(0.4 * 2.5)
