"""Preference losses on pairs of sampled completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...base import Loss, Metrics, PolicyLoss
from ...composition import merge_metrics
from ...errors import LossConfigError, named
from ...reductions import evaluate, reduce_loss
from ...registry import BuildContext, LossFunctionRegistry
from ...types import Metric, ModelOutputs, PolicyBatch, PreferenceBatch, Rollout
from .pair_halves import halves_of_pairs, prepare_halves

_REFERENCE = frozenset({"ref_per_token_logps"})


@LossFunctionRegistry.register("rollout_pairs")
class RolloutPairsLoss(PolicyLoss):
    """Any preference loss on the best against the worst completion of each prompt by reward.

    loss = mean over pairs of base(chosen, rejected),  chosen = argmax reward, rejected = argmin reward of a prompt

    Rewards are weighted and summed as for GRPO's advantages. Of several equal ones the first of the generation batch
    counts. A prompt whose completions are all rewarded alike has no pair; completions that no reward function scored,
    or without a scored token, are in none.

    The halves of a pair may land in different micro-batches or on different ranks, so each row meets what its partner's
    log-probabilities were when the completions were sampled, as constants. Each half gives its own side's gradient, and
    while the policy is still the one that sampled, the halves add up to the gradient of the pair's loss. In later
    optimizer steps on the same completions (`num_iterations` or `steps_per_generation` above the accumulation) the
    partner's side is stale by that many steps. Unless TRL keeps log-probabilities of the sampling policy anyway, they
    cost one forward pass without gradient.

    The mean is over the pairs of the generation batch, in proportion to the completions that an optimizer step holds of
    it. A base that counts pairs or completions (`adaptive_dpo` with `strategy: kl`) counts each twice.

    Logs `pair_margin`, the chosen minus the rejected log-ratio to the reference (log-probability, if the base needs no
    reference) in nats, `pair_accuracy`, how often it is above 0, `frac_prompts_with_pair`, and what the base logs.

    Args:
        base: The preference loss, a name or a dict with `type`. Fields of the trainer's config do not act on it: GRPO's
            `beta` is the coefficient of a KL term.

    Errors: A base of the policy family, or one that needs more than log-probabilities and reference (hidden states,
        logits, entropies, columns), compares pairs with one another, or averages within micro-batches.

    Source: Yuan et al. 2024, arXiv:2401.10020: pairs of highest- and lowest-scored responses, none at equal scores.
    """

    requires = _REFERENCE
    rollout_requires = _REFERENCE
    surrogate = False
    composite = True
    stop_gradient = True

    def __init__(self, *, base: str | dict | Loss = "sigmoid") -> None:
        super().__init__()
        with named("'base', a preference loss"):
            self.base = LossFunctionRegistry.build(base, context=BuildContext(family="preference"))
        _check_base(self.base)
        self.requires = self.rollout_requires = _REFERENCE if self.base.requires else frozenset()

    def components(self) -> Iterator[tuple[str, Loss]]:
        """The preference loss, as "base"."""
        yield "base", self.base

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        return prepare_halves(rollout, reference=bool(self.rollout_requires))

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        pairs, outputs = halves_of_pairs(batch, model_outputs)
        raw, reported = evaluate(self.base, pairs, outputs)
        loss = reduce_loss(self.base, raw, pairs)
        scores = outputs.log_ratios if self.requires else outputs.logps
        chosen, rejected = scores.detach().chunk(2)
        found, prompts = batch.prepared["totals"][0, :2]
        own = {
            "pair_margin": _counted(chosen - rejected, pairs),
            "pair_accuracy": _counted((chosen > rejected).to(chosen.dtype), pairs),
            "frac_prompts_with_pair": found / prompts,
        }
        counted = {name: _counted(metric, pairs) for name, metric in reported.items()}
        return loss, own | merge_metrics({"base": counted}, taken=own)

    def extra_repr(self) -> str:
        return f"base={self.base.name!r}"


def _counted(metric: Any, pairs: PreferenceBatch) -> Any:
    """A metric of pairs, completions or tokens as one in which rows without a pair do not count; others as they are."""
    value = metric.value if isinstance(metric, Metric) else metric
    size = pairs.num_pairs
    if not isinstance(value, Tensor) or value.dim() not in (1, 2) or value.size(0) not in (size, 2 * size):
        return metric
    per_token = value.dim() == 2 and value.size(1) > 1
    mask = pairs.mask[: value.size(0)] if per_token else pairs.pair_mask.repeat(value.size(0) // size)
    counted = metric if isinstance(metric, Metric) else Metric(value)
    return dataclasses.replace(counted, value=value.reshape(mask.shape), mask=mask)


def _check_base(loss: Loss) -> None:
    """Refuse what halves of pairs cannot give."""
    needs = sorted(loss.requires - _REFERENCE - {"ref_logps"}) + [f"the column '{column}'" for column in loss.columns]
    if needs:
        raise LossConfigError(
            f"'base': the loss '{loss.name}' needs {', '.join(needs)}; a pair of sampled completions has "
            "log-probabilities of policy and reference alone, since its halves may lie in different micro-batches"
        )
    if loss.batch_coupled or loss.minimum_batch > 1:
        raise LossConfigError(
            f"'base': the loss '{loss.name}' compares the pairs of a micro-batch with one another, but the pairs of "
            "sampled completions are spread over micro-batches; choose one whose pairs stand alone"
        )
    if any(leaf.reduction == "local_token_mean" for leaf in loss.leaves()):
        raise LossConfigError(
            f"'base': the loss '{loss.name}' averages within each micro-batch, but a micro-batch holds halves of "
            "pairs; choose a loss with another `reduction`"
        )
