"""Pairs of sampled completions whose halves may lie in different micro-batches and on different ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...types import Denominators, ModelOutputs, PolicyBatch, PreferenceBatch, Rollout
from .group_advantages import weighted_rewards


def prepare_halves(rollout: Rollout, *, reference: bool) -> dict[str, Tensor]:
    """Find the pairs of the generation batch and what each of this rank's rows needs of its partner.

    Args:
        rollout: The generation batch.
        reference: Whether reference log-probabilities are needed.

    Returns:
        `role`: 1 of a chosen, -1 of a rejected completion, 0 of one in no pair, (B,).
        `partner_mask`, `partner_ids`, `partner_logps` and `partner_ref_logps`: the partner's, (B, T).
        `totals`: of the generation batch, the same in every row, (B, 5): pairs, prompts, completions, tokens of pairs,
        tokens of chosen completions.
    """
    outputs = rollout.forward()
    mask = rollout.gather_padded(rollout.mask)
    rewards = weighted_rewards(rollout).masked_fill(mask.sum(1).cpu() == 0, math.nan)
    groups = rollout.group_ids.tolist()
    pairs = best_and_worst(rewards.tolist(), groups)

    roles, partners = [0] * len(groups), list(range(len(groups)))
    for chosen, rejected in pairs:
        roles[chosen], roles[rejected] = 1, -1
        partners[chosen], partners[rejected] = rejected, chosen
    role = torch.tensor(roles, device=mask.device)
    partner = torch.tensor(partners, device=mask.device)[rollout.local]
    mask = mask * (role != 0).unsqueeze(1)
    totals = outputs.per_token_logps.new_tensor([len(pairs), len(set(groups)), len(groups)])
    totals = torch.cat((totals, mask.sum().view(1), mask[role > 0].sum().view(1)))  # rounded beyond 2^24 tokens
    prepared = {
        "role": role[rollout.local],
        "totals": totals.expand(partner.size(0), -1),
        "partner_mask": mask[partner],
        "partner_ids": rollout.gather_padded(rollout.completion_ids)[partner],
        "partner_logps": rollout.gather_padded(outputs.per_token_logps)[partner],
    }
    if reference:
        prepared["partner_ref_logps"] = rollout.gather_padded(outputs.ref_per_token_logps)[partner]
    return prepared


def best_and_worst(rewards: Sequence[float], groups: Sequence[int]) -> list[tuple[int, int]]:
    """Indices of the best and the worst member of each group, the first of equals; none where all are equal.

    Args:
        rewards: One for each member; NaN leaves it out.
        groups: The group of each member.
    """
    members: dict[int, list[int]] = {}
    for index, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        if not math.isnan(reward):
            members.setdefault(group, []).append(index)
    ends = [(max(found, key=rewards.__getitem__), min(found, key=rewards.__getitem__)) for found in members.values()]
    return [(best, worst) for best, worst in ends if rewards[best] > rewards[worst]]


def halves_of_pairs(batch: PolicyBatch, outputs: ModelOutputs) -> tuple[PreferenceBatch, ModelOutputs]:
    """One pair a row: the row's own completion, with gradient, and its partner's as it was when it was sampled.

    The mean over all rows of an optimizer step is the mean over its pairs, and has its gradient; rows without a pair
    are marked in `pair_mask` and hold no tokens.

    Args:
        batch: With what `prepare_halves` returned in `prepared`.
        outputs: Of the completions.
    """
    prepared = batch.prepared
    paired = prepared["role"] != 0
    is_chosen = (prepared["role"] > 0).unsqueeze(1)
    width = max(batch.mask.size(1), prepared["partner_mask"].size(1))

    def both(own: Tensor, partner: Tensor) -> Tensor:
        own, partner = (F.pad(side, (0, width - side.size(1))) for side in (own, partner))
        return torch.cat((torch.where(is_chosen, own, partner), torch.where(is_chosen, partner, own)))

    mask = both(batch.mask * paired.unsqueeze(1), prepared["partner_mask"])
    # Every pair is averaged over twice, and the row of either half has the gradient of one side: half of it.
    logps = 2 * outputs.per_token_logps - outputs.per_token_logps.detach()
    refs = None
    if "partner_ref_logps" in prepared:
        refs = both(outputs.ref_per_token_logps, prepared["partner_ref_logps"])
    # What predicts the first token is the prompt's last.
    ids = both(batch.completion_ids, prepared["partner_ids"])
    pairs = PreferenceBatch(
        input_ids=torch.cat((batch.prompt_ids[:, -1:].repeat(2, 1), ids), dim=1),
        attention_mask=F.pad(mask, (1, 0), value=1),
        mask=mask,
        pair_mask=paired,
        ranks=batch.ranks,
        denominators=_denominators(batch.denominators, prepared["totals"][0]),
    )
    return pairs, _HalvesOutputs(
        per_token_logps=both(logps, prepared["partner_logps"]), ref_per_token_logps=refs, mask=mask, policy=outputs
    )


def _denominators(given: Denominators, totals: Tensor) -> Denominators:
    """Denominators of halves, in proportion to what the optimizer step has of the generation batch's completions."""
    pairs, _, sequences, tokens, chosen_tokens = totals.clamp(min=1).unbind()
    halves = 2 * given.sequences / sequences
    return dataclasses.replace(
        given, sequences=halves * pairs, tokens=halves * tokens, chosen_tokens=halves * chosen_tokens
    )


@dataclass(kw_only=True, eq=False, repr=False)
class _HalvesOutputs(ModelOutputs):
    """Outputs of pairs that reach the model through one side of each row alone.

    Args:
        policy: The outputs that they were made of.
    """

    policy: ModelOutputs

    def anchors(self) -> list[Tensor]:
        return self.policy.anchors()

    def slopes(self, loss: Tensor) -> list[Tensor | None]:
        return self.policy.slopes(loss)
