"""Random data, and data of extreme numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..types import Family
from .batches import LEAVES, Data


def random_data(
    family: Family,
    *,
    size: int = 4,
    length: int = 5,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Data:
    """Random data of ragged lengths; what a loss may reach the model through is a leaf that requires gradient.

    Args:
        family: "preference" or "policy".
        size: Number of pairs or sequences.
        length: Number of positions T.
        lengths: Scored tokens of each row; random, at least 1, if not given.
        seed: Of the generator.
        dtype: Of all floating-point tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 2 * size if family == "preference" else size
    if lengths is None:
        lengths = torch.randint(1, length + 1, (count,), generator=generator).tolist()
    mask = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).long()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logps = -1 - normal(count, length).abs()
    rows = {
        "logps": logps,
        "ref": logps + 0.4 * normal(count, length),
        "old": logps + 0.2 * normal(count, length),
        "entropies": normal(count, length).abs(),
        "logits": normal(count, length, 7),
        "hidden": normal(count, 3),
        "second_logits": normal(count, length, 7),
    }
    rows |= {"old_hidden": rows["hidden"] + 0.2 * normal(count, 3)}
    rows = {name: value.to(dtype) for name, value in rows.items()} | {"mask": mask}
    rows["ids"] = torch.randint(1, 6, (count, length), generator=generator)
    for name in LEAVES:
        rows[name].requires_grad_()
    items = {"advantages": normal(size), "weight": torch.rand(size, generator=generator, dtype=torch.float64)}
    items["unit"] = items["weight"].clone()  # what a column holds of which nothing else is known
    items["rewards"] = normal(size, 2)
    for side in ("chosen", "rejected"):
        items[f"{side}_unsafe"] = torch.rand(size, generator=generator, dtype=torch.float64)
    items = {name: value.to(dtype) for name, value in items.items()} | {
        "group_ids": (torch.arange(size) // 2).clamp(max=max(size // 2 - 1, 0))
    }
    return Data(family=family, rows=rows, items=items)


def extreme_data(family: Family, *, log_ratios: Sequence[float], advantages: Sequence[float] = ()) -> Data:
    """One-token float32 rows whose log-ratios to both the reference and the generating policy are given.

    Args:
        family: "preference" (`log_ratios`: chosen, then rejected) or "policy".
        log_ratios: Of each row, nats.
        advantages: Of each sequence.
    """
    size = len(log_ratios) // 2 if family == "preference" else len(log_ratios)
    data = random_data(family, size=size, length=1, dtype=torch.float32)
    ratios = torch.tensor(log_ratios).unsqueeze(1)
    logps = (-1 + ratios.clamp(max=0)).requires_grad_()  # no probability is above 1
    base = -1 - ratios.clamp(min=0)
    items = data.items | ({"advantages": torch.tensor(advantages)} if advantages else {})
    return replace(data.with_rows(logps=logps, ref=base, old=base), items=items)
