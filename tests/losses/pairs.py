"""Sampled completions with pairs among them, and the loss of these pairs before anything is split."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import Loss, ModelOutputs, PreferenceBatch
from trl_custom_losses.reductions import evaluate, reduce_loss
from trl_custom_losses.testing import Data, random_data

NAN = math.nan

# Prompt 0: best 2, worst 1. Prompt 1: all alike. Prompt 2: best 8, worst 9, since 10 was not scored. Prompt 3: one
# completion was scored.
_REWARDS = [1.0, -2.0, 3.0, 1.0, 5.0, 5.0, 5.0, 5.0, 0.5, -0.5, NAN, 0.0, NAN, NAN, 7.0, NAN]
#: Chosen and rejected completions of `sampled`.
PAIRS = [(2, 1), (8, 9)]
#: A sum of losses of pairs.
COMPOSED: dict[str, Any] = {
    "type": "composed",
    "components": [
        {"type": "sigmoid", "weight": 0.7, "beta": 0.4},
        {"type": "sft", "weight": 0.2},
        {"type": "ipo", "weight": -0.1, "beta": 0.5},
    ],
}


def sampled(*, rewards: list[float] | None = None, on_policy: bool = True) -> Data:
    """16 completions of 4 prompts; on policy, the log-probabilities are those at sampling time."""
    data = random_data("policy", size=16, lengths=[3, 2, 1, 3, 2, 2, 3, 1, 4, 5, 2, 1, 3, 2, 4, 1])
    values = torch.tensor(_REWARDS if rewards is None else rewards, dtype=torch.float64)
    items = {"rewards": torch.stack((values, torch.full_like(values, NAN)), 1), "group_ids": torch.arange(16) // 4}
    data = replace(data, items=data.items | items)
    return data.with_rows(old=data.rows["logps"].detach()) if on_policy else data


def whole_pairs(base: Loss, data: Data, pairs: list[tuple[int, int]] = PAIRS) -> Tensor:
    """The reduced loss of unsplit pairs, with gradient on both sides."""
    rows = torch.tensor([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs])
    mask = data.rows["mask"][rows]
    ids = mask.new_zeros(mask.size(0), mask.size(1) + 1)
    batch = PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask)
    outputs = ModelOutputs(
        per_token_logps=data.rows["logps"][rows], ref_per_token_logps=data.rows["ref"][rows], mask=mask
    )
    raw, _ = evaluate(base, batch, outputs)
    return reduce_loss(base, raw, batch)


def gradient(loss: Tensor, data: Data) -> Tensor:
    """Gradient with respect to the log-probabilities of all completions."""
    return torch.autograd.grad(loss, data.rows["logps"])[0]


def shuffled(count: int, parts: int, seed: int) -> list[list[int]]:
    """Rows in random order, in parts of equal size."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [part.tolist() for part in order.chunk(parts)]


def assert_equal(found: Tensor, expected: Tensor, data: Data) -> None:
    """The same value and the same gradient, to the last digits of float64."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(found, data), gradient(expected, data), rtol=1e-11, atol=1e-13)
