"""What the forward passes produced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MissingFieldError
from ..fields import ExplainsMissingFields, optional
from .common import masked_sum, slopes_of


@dataclass(kw_only=True, eq=False, repr=False)
class ModelOutputs(ExplainsMissingFields):
    """What the forward passes produced; N = 2B rows (chosen, then rejected) for pairs, N = B for completions.

    Args:
        per_token_logps: Policy log-probabilities, nats, (N, T), with gradient.
        mask: 1 where a position is scored, (N, T).
        entropies: Entropies, nats, (N, T), with gradient.
        ref_per_token_logps: Reference log-probabilities, (N, T).
        ref_sums: Reference sums where only those are known (precomputed), (N,).
        old_per_token_logps: Log-probabilities at generation time, (N, T), detached.
        completion_lengths: Number of completion tokens, (N,), where it can exceed the scored ones by a first token
            that nothing predicts.
        token_weights: Weights of tokens in `logps` and `ref_logps` (LD-DPO), (N, T).
        pooled_hidden: Mean last hidden state over completion tokens, (N, H), float32, with gradient.
        sequence_hidden: Mean last hidden state over prompt and completion, (N, H), float32, detached.
        logits: (N, T, V), with gradient.
        second_logits: The same of a second pass with other dropout, (N, T, V), with gradient.
    """

    per_token_logps: Tensor
    mask: Tensor
    entropies: Tensor = optional()
    ref_per_token_logps: Tensor = optional()
    ref_sums: Tensor = optional()
    old_per_token_logps: Tensor = optional()
    completion_lengths: Tensor = optional()
    token_weights: Tensor = optional()
    pooled_hidden: Tensor = optional()
    sequence_hidden: Tensor = optional()
    logits: Tensor = optional()
    second_logits: Tensor = optional()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) and "logits" not in name:
                setattr(self, name, value.float())  # loss arithmetic is float32 or better
        for name in ("ref_per_token_logps", "ref_sums", "old_per_token_logps", "token_weights", "sequence_hidden"):
            if self.has(name):  # only the policy is trained
                setattr(self, name, getattr(self, name).detach())
        masked = self.mask == 0
        for name in ("per_token_logps", "entropies", "ref_per_token_logps", "old_per_token_logps"):
            if self.has(name):  # whatever stands at a masked position, a loss sees 0 there and sends no gradient back
                setattr(self, name, getattr(self, name).masked_fill(masked, 0))

    def _weighted_sum(self, per_token: Tensor) -> Tensor:
        if self.has("token_weights"):
            per_token = per_token * self.token_weights
        # 0 at masked positions since construction; masked here, the gradient with respect to `anchors` is 0 there too.
        return masked_sum(per_token, self.mask)

    @property
    def token_kl(self) -> Tensor:
        """k3 estimate of the KL to the reference at each token, nats, (N, T), detached and 0 at masked positions.

        exp(-d) - 1 + d,  d = log policy - log reference, with -d held at 80: float32 overflows beyond exp(88).
        """
        minus_d = (self.ref_per_token_logps - self.per_token_logps.detach()).clamp(max=80.0)
        return torch.expm1(minus_d) - minus_d

    def anchors(self) -> list[Tensor]:
        """The tensors through which every loss reaches the model, each counted once.

        Log-probabilities and entropies are computed from the logits where there are any; then those stand for all.
        """
        names = ("logits", "second_logits") if self.has("logits") else ("per_token_logps", "entropies")
        found = [getattr(self, name) for name in (*names, "pooled_hidden") if self.has(name)]
        return [tensor for tensor in found if tensor.requires_grad]

    def slopes(self, loss: Tensor) -> list[Tensor | None]:
        """Gradients of `loss` with respect to the anchors, None where it does not depend on one; the graph stays.

        At masked positions log-probabilities and entropies do not reach the model, so that their gradients are 0 there,
        however the loss treats such positions.

        Args:
            loss: Scalar, computed from these outputs.
        """
        anchors = self.anchors()
        masked = [id(getattr(self, name)) for name in ("per_token_logps", "entropies") if self.has(name)]
        return [
            gradient if gradient is None or id(anchor) not in masked else gradient.masked_fill(self.mask == 0, 0)
            for anchor, gradient in zip(anchors, slopes_of(loss, anchors), strict=True)
        ]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """As `slopes`, with zeros in place of None."""
        pairs = zip(self.anchors(), self.slopes(loss), strict=True)
        return [torch.zeros_like(anchor) if gradient is None else gradient for anchor, gradient in pairs]

    @property
    def lengths(self) -> Tensor:
        """Number of completion tokens of each row, at least 1, (N,)."""
        lengths = self.completion_lengths if self.has("completion_lengths") else self.mask.sum(dim=1)
        return lengths.clamp(min=1)

    @property
    def logps(self) -> Tensor:
        """Policy log-probability of each completion (LD-DPO weights applied), nats, (N,)."""
        return self._weighted_sum(self.per_token_logps)

    @property
    def mean_logps(self) -> Tensor:
        """`logps` over `lengths`, nats per token, (N,)."""
        return self.logps / self.lengths

    @property
    def ref_logps(self) -> Tensor:
        """Reference log-probability of each completion, nats, (N,)."""
        if self.has("ref_sums"):
            return self.ref_sums
        if not self.has("ref_per_token_logps"):
            raise MissingFieldError(
                "there are no reference log-probabilities here: the loss must declare `requires = {'ref_logps'}` "
                "(preference) or `{'ref_per_token_logps'}` (policy) for the trainer to compute them"
            )
        return self._weighted_sum(self.ref_per_token_logps)

    @property
    def log_ratios(self) -> Tensor:
        """`logps - ref_logps`: the implicit reward over beta, nats, (N,)."""
        return self.logps - self.ref_logps
