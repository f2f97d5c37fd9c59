"""The numbers behind the pictures of a loss: its value and gradient where margin or importance ratio vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..base import Loss
from ..errors import LossConfigError
from ..reductions import evaluate, reduce_loss
from ..registry import LossFunctionRegistry
from ..types import Family, ModelOutputs, PolicyBatch, PreferenceBatch

#: What the made-up batches hold beside the policy's log-probabilities.
_GIVEN: Mapping[str, frozenset[str]] = {
    "preference": frozenset({"ref_logps", "ref_per_token_logps"}),
    "policy": frozenset({"old_per_token_logps"}),
}
_POINTS = 241
#: Margins reach this far where the loss has a beta, in units of 1 / beta; and without one, nats.
_SCALED_REACH, _REACH = 6.0, 60.0
_LOWEST_RATIO, _HIGHEST_RATIO = 0.02, 3.0
#: Log-probability of the token at generation time, nats: exp(-2) times any drawn ratio is a probability.
_OLD_LOGP = -2.0


@dataclass(frozen=True)
class PreferenceCurve:
    """A preference loss of one pair of one-token completions.

    Args:
        margins: Log-ratio of the chosen minus that of the rejected completion, nats, (n,); each has half of it.
        values: Loss, (n,).
        chosen, rejected: Derivative of the loss by the log-ratio of the chosen and of the rejected completion, (n,).
        beta: Of the loss, None if it has none.
        reference: The assumed log-probability of both completions under the reference, nats, if the numbers depend on
            it and not on the margin alone; else None.
    """

    margins: np.ndarray
    values: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    beta: float | None
    reference: float | None = None


@dataclass(frozen=True)
class PolicyCurve:
    """A policy surrogate of one sampled token.

    Args:
        ratios: Probability under the policy over that at generation time, (n,).
        values: Loss before any average over tokens, by advantage, each (n,).
        gradients: Its derivative by the token's log-probability, by advantage, each (n,).
    """

    ratios: np.ndarray
    values: Mapping[float, np.ndarray]
    gradients: Mapping[float, np.ndarray]


def build(config: str | Mapping[str, Any]) -> Loss:
    """Make the loss; what is missing is that of the class's `example` (see `LossFunctionRegistry.with_example`).

    Raises:
        LossConfigError: It cannot be built.
    """
    if not isinstance(config, (str, Mapping)):
        raise LossConfigError(f"a loss was needed, as a name or a dict with 'type'; found {config!r}")
    settings = {"type": config} if isinstance(config, str) else dict(config)
    if isinstance(settings.get("type"), str):
        name = settings.pop("type")
        settings = {"type": name, **LossFunctionRegistry.with_example(LossFunctionRegistry.get(name), settings, name)}
    return LossFunctionRegistry.build(settings).eval()


def _obstacle(loss: Loss) -> str:
    """Why a made-up pair or token of one number does not determine this loss; empty if it does."""
    if loss.family not in _GIVEN:
        return "belongs to no family"
    missing = sorted(loss.requires - _GIVEN[loss.family])
    if missing:
        return f"needs {', '.join(missing)}, which a picture against one number cannot hold"
    if len(example_columns(loss)) < len(loss.columns):
        return f"reads the data-set columns {', '.join(loss.columns)}, so that its value depends on the row"
    if loss.prepares:
        return "prepares whole generation batches, so that its value depends on the other completions of a prompt"
    if loss.minimum_batch > 1 or (loss.batch_coupled and loss.family == "policy"):
        return "compares the pairs or sequences of a batch with each other, so that one alone says nothing of it"
    if loss.family == "policy" and not any(leaf.surrogate for leaf in loss.leaves()):
        return "is no surrogate of the importance ratio"
    return ""


def example_columns(loss: Loss) -> dict[str, float]:
    """The first example of each data-set column that a loss reads, as far as it gives numbers as examples."""
    examples = {name: values for part in loss.tree() for name, values in part.column_examples.items()}
    first = {name: examples[name][0] for name in loss.columns if examples.get(name)}
    return {name: float(value) for name, value in first.items() if isinstance(value, (int, float))}


def why_not_drawable(config: str | Mapping[str, Any]) -> str:
    """Why `plot_loss` refuses a loss; empty if it draws it.

    Args:
        config: A registered name, an import path, or a dict with `type` and hyperparameters.

    Raises:
        LossConfigError: The loss cannot be built.
    """
    return _obstacle(build(config))


def drawable_losses(family: Family | None = None) -> list[str]:
    """Names of the registered losses that `plot_loss` draws, of one family or of both.

    A loss that cannot be built without a configuration of its own is left out.
    """
    names = []
    for name in LossFunctionRegistry.names(family):
        try:
            loss = build(name)
        except LossConfigError:
            continue
        if not _obstacle(loss) and family in (None, loss.family):
            names.append(name)
    return names


def drawable(config: str | Mapping[str, Any]) -> Loss:
    """Build a loss that can be drawn.

    Raises:
        LossConfigError: It cannot be built or drawn; the message says why.
    """
    loss = build(config)
    obstacle = _obstacle(loss)
    if obstacle:
        raise LossConfigError(
            f"the loss '{loss.name}' has no picture: it {obstacle}. "
            "`trl_custom_losses.plotting.drawable_losses()` lists those that have one"
        )
    return loss


def beta_of(loss: Loss) -> float | None:
    """The loss's beta, or that of its first part that has one."""
    for leaf in loss.leaves():
        beta = getattr(leaf.owner_of("beta"), "beta", None)
        if isinstance(beta, (int, float)) and beta > 0:
            return float(beta)
    return None


def preference_curve(loss: Loss, reach: float | None = None, *, points: int = _POINTS) -> PreferenceCurve:
    """Value and gradient of a preference loss over margins from `-reach` to `reach` nats.

    Args:
        loss: That can be drawn.
        reach: By default 6 / beta, or 60 nats without a beta.
        points: Number of margins.
    """
    beta = beta_of(loss)
    if reach is None:
        reach = _REACH if beta is None else _SCALED_REACH / beta
    margins = torch.linspace(-reach, reach, points, dtype=torch.float64)
    reference = -1 - reach / 2  # low enough for the policy's log-probabilities to be below 0
    found = [_pair(loss, margin, reference) for margin in margins]
    values, chosen, rejected = np.array(found).T
    middle = points // 2  # with another reference, is it another number?
    absolute = not np.allclose(found[middle], _pair(loss, margins[middle], reference - 1.0))
    return PreferenceCurve(margins.numpy(), values, chosen, rejected, beta, reference if absolute else None)


def _pair(loss: Loss, margin: torch.Tensor, reference: float) -> tuple[float, float, float]:
    mask = torch.ones(2, 1, dtype=torch.long)
    ids = torch.zeros(2, 2, dtype=torch.long)
    refs = torch.full((2, 1), reference, dtype=torch.float64)
    logps = (refs + torch.stack((margin, -margin)).unsqueeze(1) / 2).requires_grad_()
    columns = {name: torch.tensor([value], dtype=torch.float64) for name, value in example_columns(loss).items()}
    batch = PreferenceBatch(input_ids=ids, attention_mask=torch.ones_like(ids), mask=mask, columns=columns)
    raw, _ = evaluate(loss, batch, ModelOutputs(per_token_logps=logps, ref_per_token_logps=refs, mask=mask))
    value = reduce_loss(loss, raw, batch)
    gradient = _gradient(loss, value, logps)
    return value.item(), gradient[0].item(), gradient[1].item()


def policy_curve(loss: Loss, highest: float = _HIGHEST_RATIO, *, points: int = _POINTS) -> PolicyCurve:
    """Value and gradient of a policy surrogate over importance ratios up to `highest`, for advantages of 1 and -1.

    Args:
        loss: That can be drawn.
        highest: Ratio, at most 7, where a token's probability would exceed 1.
        points: Number of ratios.
    """
    ratios = torch.linspace(_LOWEST_RATIO, highest, points, dtype=torch.float64)
    values, gradients = {}, {}
    for advantage in (1.0, -1.0):
        found = [_token(loss, ratio, advantage) for ratio in ratios]
        values[advantage], gradients[advantage] = np.array(found).T
    return PolicyCurve(ratios.numpy(), values, gradients)


def _token(loss: Loss, ratio: torch.Tensor, advantage: float) -> tuple[float, float]:
    mask = torch.ones(1, 1, dtype=torch.long)
    old = torch.full((1, 1), _OLD_LOGP, dtype=torch.float64)
    logps = (old + ratio.log()).requires_grad_()
    batch = PolicyBatch(
        prompt_ids=mask, completion_ids=mask, mask=mask, advantages=torch.tensor([advantage], dtype=torch.float64)
    )
    raw, _ = evaluate(loss, batch, ModelOutputs(per_token_logps=logps, old_per_token_logps=old, mask=mask))
    value = raw.sum()  # one token: before the average, which may divide by a fixed length
    return value.item(), _gradient(loss, value, logps).item()


def _gradient(loss: Loss, value: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    if not value.requires_grad:
        raise LossConfigError(f"the loss '{loss.name}' has no picture: it does not depend on the log-probabilities")
    (gradient,) = torch.autograd.grad(value, logps, allow_unused=True)
    return torch.zeros_like(logps) if gradient is None else gradient
