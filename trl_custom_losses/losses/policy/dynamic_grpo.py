"""GRPO whose groups are found among the responses."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_choice, check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PolicyBatch, Rollout
from .group_advantages import SimilarityAdvantageLoss, weighted_rewards
from .similarity import Similarities

Scope = Literal["batch", "prompt"]

# Most near pairs that are kept: so many in any batch, and so many for each response, less than what its vector takes.
_KEPT, _KEPT_EACH = 2**18, 128
_STATISTICS = ("num_dynamic_groups", "avg_group_size", "frac_singleton_groups")


@LossFunctionRegistry.register("dynamic_grpo")
class DynamicGRPOLoss(SimilarityAdvantageLoss):
    """GRPO with advantages against groups of similar responses, found anew in every generation batch.

    A_i = (r_i - mean_{g(i)} r) / (std_{g(i)} r + 1e-4),  then as grpo;  r = weighted sum of a response's rewards

    Groups are formed over all ranks, one after the other. Its leader is, of the responses without a group, the one
    most of these are similar to, that is with a cosine of at least the threshold; then the one whose similarities to
    them sum to most; then the first of the generation batch. The leader takes the most similar of them along, the
    first where two are equally similar, up to the largest size. Similarities are rounded to 5 decimals before, so that
    floating-point noise decides nothing. So each response is in exactly one group, groups do not depend on how ranks
    split the batch, nor, but for ties, on the order of the batch.

    A response that is alone in its group, or whose fellows were all not scored, is compared with its prompt's
    responses, as in GRPO; a response that was not scored gets advantage 0. A response without a scored token
    (truncated ones, where those are masked) is similar to none. Logs `num_dynamic_groups`, `avg_group_size` and
    `frac_singleton_groups` of the generation batch.

    Deviates from the tutorial, which puts a response into every group whose leader it resembles, takes the first
    responses and not the most similar ones when a group is full, and never uses the groups it has found. Hidden states
    of language models point in similar directions: watch `avg_group_size` and choose the threshold by it.

    Args:
        similarity_threshold: Cosine from which on two responses are similar, in [-1, 1].
        max_group_size: Most responses in a group, >= 1; at 1 it is GRPO.
        scope: "batch" groups responses to any prompts of the generation batch, "prompt" those to one prompt.
        embedding, max_ngram, scale_rewards: See `SimilarityAdvantageLoss`.
        epsilon, epsilon_high, delta, importance_sampling_level: As for `grpo`.

    Errors: An embedding that cannot be imported; `multi_objective_aggregation='normalize_then_sum'`.

    Source: After the dynamic grouping of NeMo RL's tutorial on custom losses, on GRPO, Shao et al. 2024,
    arXiv:2402.03300.
    """

    def __init__(
        self,
        *,
        similarity_threshold: float = 0.8,
        max_group_size: int = 10,
        scope: Scope = "batch",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.similarity_threshold = check_range("similarity_threshold", similarity_threshold, at_least=-1, at_most=1)
        self.max_group_size = int(check_range("max_group_size", max_group_size, at_least=1))
        self.scope = check_choice("scope", scope, Scope)

    def groups(self, rollout: Rollout) -> Tensor:
        """The group of each response of the generation batch, numbered from 0, (N,), on the host."""
        prompts, similarities = rollout.group_ids.cpu(), self.similarities(rollout)
        scored = rollout.gather((rollout.mask > 0).any(dim=1)).cpu()
        compared = torch.where(scored)[0]
        if compared.numel() < scored.numel():
            prompts, similarities = prompts[compared], similarities.take(compared)
        fields = prompts if self.scope == "prompt" else None
        found = form_groups(similarities, self.similarity_threshold, self.max_group_size, fields)
        groups = torch.arange(scored.numel()) + scored.numel()  # what is not scored is by itself
        groups[compared] = found
        return groups.unique(return_inverse=True)[1]

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        groups = self.groups(rollout)
        advantages = self.advantages(rollout, weighted_rewards(rollout), groups)
        sizes = groups.bincount()
        number = float(sizes.numel())
        found = (number, groups.numel() / number, int((sizes == 1).sum()) / number)
        # A row each, so that averages over micro-batches are right however the batch is split.
        statistics = {name: torch.full_like(advantages, value) for name, value in zip(_STATISTICS, found, strict=True)}
        return {"advantages": advantages, **statistics}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        loss, metrics = super().forward(batch, model_outputs)
        return loss, {**metrics, **{name: batch[name] for name in _STATISTICS}}


def form_groups(similarities: Similarities, threshold: float, largest: int, fields: Tensor | None = None) -> Tensor:
    """Put each response into one group of responses that are near its leader; see `DynamicGRPOLoss` for the rule.

    Similarities are computed once, and of them the pairs of near responses kept, where these are few. Where they are
    many, those of a group's members are computed again when the group is formed, which `_Many` describes. So memory
    grows as the number of responses, not as that of their pairs.

    Args:
        similarities: Between N responses.
        threshold: Similarity from which on two responses are near.
        largest: Most responses in a group.
        fields: Responses that may be in a group have the same number, (N,), on the host; all by default.

    Returns:
        Group numbers from 0, (N,), on the host; in the order of the groups' formation, but where responses are compared
        within large fields or groups have one member.
    """
    size = similarities.size
    if largest == 1:
        return torch.arange(size)
    if fields is not None:
        fields = fields.unique(return_inverse=True)[1]
        if fields.bincount().square().sum() > _room(size):  # one field after the other, fewer pairs at a time
            return _field_by_field(similarities, threshold, largest, fields)
    units = _least_units(threshold)
    groups, left, number = torch.full((size,), -1), torch.arange(size), 0
    while left.numel():
        found = _form_some(similarities, units, largest, fields)
        groups[left] = torch.where(found < 0, found, found + number)
        number += int(found.max()) + 1
        rest = torch.where(found < 0)[0]
        left, similarities = left[rest], similarities.take(rest)
        fields = None if fields is None else fields[rest]
    return groups


def _field_by_field(similarities: Similarities, threshold: float, largest: int, fields: Tensor) -> Tensor:
    groups, number = torch.empty_like(fields), 0
    for members in fields.argsort(stable=True).split(fields.bincount().tolist()):
        groups[members] = number + form_groups(similarities.take(members), threshold, largest)
        number = int(groups[members].max()) + 1
    return groups


def _room(size: int) -> int:
    return max(_KEPT, _KEPT_EACH * size)


def _least_units(threshold: float) -> int:
    """The smallest similarity, in whole numbers of 1e-5, that is at least the threshold."""
    about = math.floor(threshold * 1e5)
    return next(units for units in (about, about + 1) if units / 1e5 >= threshold)


def _form_some(similarities: Similarities, units: int, largest: int, fields: Tensor | None) -> Tensor:
    """Form groups until all responses have one or it pays to begin anew with the rest; -1 for these, (N,)."""
    size = similarities.size
    links = _survey(similarities, units, fields)
    groups = torch.full((size,), -1)
    for number in range(size):
        leader = int(links.keys.argmax())  # the first of the largest
        if links.keys[leader] <= 0:  # responses that are near to none are left
            alone = torch.where(groups < 0)[0]
            groups[alone] = torch.arange(number, number + alone.numel())
            break
        others, weights = links.of(leader)
        free = groups[others] < 0
        nearest = weights[free].argsort(descending=True, stable=True)[: largest - 1]
        members = torch.cat((torch.tensor([leader]), others[free][nearest]))
        groups[members] = number
        links.remove(members)
        if links.begin_anew():
            break
    return groups


def _survey(similarities: Similarities, units: int, fields: Tensor | None) -> _Few | _Many:
    """Find the links between near responses, and each response's key: the sum of its links' weights.

    A link weighs its similarity and a constant so large that, of two responses, the one with more links has the larger
    key, and of two with equally many links the one with the more similar ones.
    """
    size = similarities.size
    constant = 2 * 10**5 * size + 1
    keys = torch.zeros(size, dtype=torch.long, device=similarities.device)
    pairs: list[Tensor] = []
    room = _room(size)
    for rows, columns, found, compared in similarities.tiles(fields):
        near = compared & (found >= units)
        keys[rows] += torch.where(near, found + constant, 0).sum(1).long()
        if room < 0:
            continue
        row, column = near.nonzero(as_tuple=True)
        room -= row.numel()
        pairs.append(torch.stack((rows[row], columns[column], found[row, column].long() + constant)).cpu())
    if room < 0:
        return _Many(similarities, units, constant, keys.cpu())
    return _Few(torch.cat(pairs, dim=1), keys.cpu())


class _Few:
    """Links that are all kept.

    Args:
        pairs: Responses, others, and the weights of their links, (3, number of links), both ways; from each response,
            links to others come in these' order.
        keys: Sums of the weights of each response's links to those without a group, (N,); -1 for one that has a group.
    """

    def __init__(self, pairs: Tensor, keys: Tensor) -> None:
        rows, others, weights = pairs[:, pairs[0].argsort(stable=True)]
        counts = rows.bincount(minlength=keys.numel()).tolist()
        self._others, self._weights = others.split(counts), weights.split(counts)
        self.keys = keys

    def of(self, response: int) -> tuple[Tensor, Tensor]:
        """The responses near one, in the order of the batch, and the weights of the links to them."""
        return self._others[response], self._weights[response]

    def remove(self, members: Tensor) -> None:
        """Take the members of a new group, and their links, away."""
        chosen = members.tolist()
        others = torch.cat([self._others[member] for member in chosen])
        self.keys.index_add_(0, others, torch.cat([self._weights[member] for member in chosen]), alpha=-1)
        self.keys[members] = -1

    def begin_anew(self) -> bool:
        return False


class _Many:
    """Links that are computed when they are asked for; otherwise as `_Few`.

    That costs the more, the more responses there are, so that it pays to begin anew when half of them have a group, or
    when the links that are left can be kept.
    """

    def __init__(self, similarities: Similarities, units: int, constant: int, keys: Tensor) -> None:
        self._similarities, self._units, self._constant, self.keys = similarities, units, constant, keys
        self._at_once = max(1, similarities.side**2 // similarities.size)

    def of(self, response: int) -> tuple[Tensor, Tensor]:
        weights = self._weights(torch.tensor([response]))[0].cpu()
        others = torch.where(weights > 0)[0]
        return others, weights[others]

    def remove(self, members: Tensor) -> None:
        for some in members.split(self._at_once):
            self.keys -= self._weights(some).sum(0).long().cpu()
        self.keys[members] = -1

    def begin_anew(self) -> bool:
        free = self.keys >= 0
        few = self.keys[free].double().sum() <= 0.9 * _room(int(free.sum())) * self._constant
        return bool(few) or bool(2 * free.sum() <= free.numel())

    def _weights(self, responses: Tensor) -> Tensor:
        """Weights of links from some responses to all, 0 where there is none, (R, N), float64."""
        found = self._similarities.units(responses, slice(None))
        weights = torch.where(found >= self._units, found + self._constant, 0)
        weights[torch.arange(responses.numel()), responses] = 0
        return weights
