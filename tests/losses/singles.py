"""Single pairs and sequences of chosen numbers, their losses and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trl_custom_losses import Loss, ModelOutputs, PolicyBatch, PreferenceBatch
from trl_custom_losses.testing import Data, random_data


def single_pair(
    chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)
) -> tuple[PreferenceBatch, ModelOutputs]:
    """One pair of completions whose log-ratios to the reference are `chosen` and `rejected` nats, in float64."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    ref = torch.tensor([[-2.0], [-3.0]], dtype=torch.float64).expand(mask.shape)
    ratios = torch.tensor([[chosen / lengths[0]], [rejected / lengths[1]]], dtype=torch.float64)
    logps = (ref + ratios).requires_grad_()
    ids = torch.zeros(2, mask.size(1) + 1, dtype=torch.long)
    batch = PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask)
    return batch, ModelOutputs(per_token_logps=logps, ref_per_token_logps=ref, mask=mask)


def pair_loss(loss: Loss, chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)) -> float:
    """The loss of one pair of given log-ratios, nats."""
    raw, _ = loss(*single_pair(chosen, rejected, lengths))
    assert raw.shape == (1,)
    return raw.item()


def pair_gradient(loss: Loss, chosen: float, rejected: float) -> tuple[float, float]:
    """Derivatives of the loss of one pair with respect to the chosen and the rejected log-ratio."""
    batch, outputs = single_pair(chosen, rejected)
    raw, _ = loss(batch, outputs)
    (gradient,) = torch.autograd.grad(raw.sum(), outputs.per_token_logps)
    return gradient[0, 0].item(), gradient[1, 0].item()


def single_sequence(
    ratios: Sequence[float], advantage: float, old: float = -1.5, **fields: Any
) -> tuple[PolicyBatch, ModelOutputs]:
    """One completion whose tokens have the given importance ratios, in float64."""
    mask = torch.ones(1, len(ratios), dtype=torch.long)
    olds = torch.full(mask.shape, old, dtype=torch.float64)
    logps = (olds + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    batch = PolicyBatch(
        prompt_ids=mask,
        completion_ids=mask,
        mask=mask,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        **fields,
    )
    return batch, ModelOutputs(per_token_logps=logps, old_per_token_logps=olds, mask=mask)


def token_losses(loss: Loss, ratios: Sequence[float], advantage: float, **fields: Any) -> list[float]:
    """The unreduced loss of each token of one completion of given importance ratios."""
    batch, outputs = single_sequence(ratios, advantage, **fields)
    raw, _ = loss(batch, outputs)
    return raw.expand(1, len(ratios))[0].tolist()


def token_gradients(loss: Loss, ratios: Sequence[float], advantage: float, **fields: Any) -> list[float]:
    """Derivative of the sum of the unreduced losses with respect to each token's log-probability."""
    batch, outputs = single_sequence(ratios, advantage, **fields)
    raw, _ = loss(batch, outputs)
    (gradient,) = torch.autograd.grad(raw.expand(1, len(ratios)).sum(), outputs.per_token_logps)
    return gradient[0].tolist()


def on_policy_data() -> Data:
    """Completions of 1 and 3 tokens with advantages 2 and -1, at ratio 1."""
    data = random_data("policy", size=2, length=4, lengths=[1, 3])
    data = replace(data, items={"advantages": torch.tensor([2.0, -1.0], dtype=torch.float64)})
    return data.with_rows(old=data.rows["logps"].detach())


def on_policy_loss(loss: Loss) -> float:
    """Reduced loss of `on_policy_data`."""
    return on_policy_data().loss(loss).item()


def column_pairs(policy: Sequence[float], ref: Sequence[float]) -> tuple[PreferenceBatch, ModelOutputs]:
    """Pairs of one-token completions with given policy and reference log-probabilities (chosen, then rejected)."""
    mask = torch.ones(len(policy), 1, dtype=torch.long)
    logps, refs = (torch.tensor(values, dtype=torch.float64).unsqueeze(1) for values in (policy, ref))
    batch = PreferenceBatch(input_ids=mask, attention_mask=mask, mask=mask)
    return batch, ModelOutputs(per_token_logps=logps, ref_per_token_logps=refs, mask=mask)
