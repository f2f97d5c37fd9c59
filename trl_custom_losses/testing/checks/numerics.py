"""Inputs at the edge: nothing to score, and numbers far out."""

from __future__ import annotations

from ...base import Loss
from ...types import Family
from ..batches import Data
from ..check import check, fail, require_finite
from ..random_data import extreme_data
from ..subject import Subject


def _require_finite(loss: Loss, data: Data, where: str) -> dict:
    value = data.loss(loss)
    require_finite(value, f"{where}, the loss")
    gradients = data.gradients(loss, value)
    for name, gradient in gradients.items():
        require_finite(gradient, f"{where}, the gradient (rows '{name}')")
    return gradients


@check(
    usual_cause="a division by the number of tokens, which is 0: use `outputs.lengths`, which is at least 1, or "
    "`outputs.mean_logps`",
)
def empty_completions(subject: Subject) -> None:
    """Empty completions give a finite loss and no gradient."""
    for which in ("one completion is empty", "all completions are empty"):
        loss = subject.build()
        rows = subject.data(size=3).rows["mask"].size(0)
        lengths = [0] * rows if which.startswith("all") else [(2, 0, 3, 1, 4, 2)[row % 6] for row in range(rows)]
        data = subject.data(size=3, length=4, lengths=lengths)
        masked = data.rows["mask"] == 0
        for name, gradient in _require_finite(loss, data, f"where {which}").items():
            if name == "hidden":  # the trainer's mean over no token is 0, whatever the model
                continue
            if gradient[masked].any():
                largest = float(gradient[masked].abs().max())
                fail(
                    f"where {which}, positions that are not scored (rows '{name}') get a gradient of up to "
                    f"{largest:.3g}"
                )


@check(
    usual_cause="a variance or a difference of neighbours over the tokens of a completion",
)
def single_tokens(subject: Subject) -> None:
    """Completions of one token give a finite loss and a gradient."""
    gradients = _require_finite(subject.build(), subject.data(length=1), "for completions of one token")
    if not any(gradient.any() for gradient in gradients.values()):
        fail("for completions of one token, all gradients are 0")


@check(
    usual_cause="`exp`, `log(sigmoid(x))` or `log(1 + exp(x))` of an unbounded number: use `F.logsigmoid`, "
    "`F.softplus`, "
    "`torch.log1p`, or clamp the exponent. A clamp after the `exp` keeps the value finite, but not the "
    "gradient",
)
def extreme_log_ratios(subject: Subject) -> None:
    """Log-ratios of up to 10,000 nats, and advantages as large, give a finite loss and gradient in float32."""
    loss = subject.build()
    for nats, advantage in ((80.0, 100.0), (1e4, 1e4)):
        for data, what in _extremes(loss.family, nats, advantage, max(loss.minimum_batch, 2)):
            _require_finite(subject.as_built(), data, f"at {what}")


def _extremes(family: Family, nats: float, advantage: float, copies: int) -> list[tuple[Data, str]]:
    signs = [(first, second) for first in (-1, 1) for second in (-1, 1)]
    if family == "policy":
        return [
            (
                extreme_data(family, log_ratios=[first * nats] * copies, advantages=[second * advantage] * copies),
                f"a log-ratio of {first * nats:g} nats and an advantage of {second * advantage:g}",
            )
            for first, second in signs
        ]
    return [
        (
            extreme_data(family, log_ratios=[first * nats] * copies + [second * nats] * copies),
            f"log-ratios of {first * nats:g} (chosen) and {second * nats:g} nats (rejected)",
        )
        for first, second in signs
    ]
