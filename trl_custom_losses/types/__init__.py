"""What a loss sees: the batch (data) and the model outputs (what the forward passes produced).

Shapes use B for the pairs (preference) or sequences (policy) of one micro-batch on one device, T for the scored
positions and H for the hidden size. Log-probabilities are natural logarithms, so their unit is nats.

| field | shape | meaning | present |
|---|---|---|---|
| `outputs.per_token_logps` | (2B, T) or (B, T) | policy log-probability of each token, with gradient | always |
| `outputs.mask` | same | 1 where the position is a scored completion token | always |
| `outputs.entropies` | same | entropy of the next-token distribution, nats, with gradient | always |
| `outputs.logps`, `.mean_logps`, `.lengths` | (2B,) or (B,) | sum, mean and number of completion tokens | always |
| `outputs.ref_logps`, `.log_ratios` | (2B,) or (B,) | reference sum; policy minus reference | preference: always; \
policy: with `ref_per_token_logps` |
| `outputs.ref_per_token_logps` | as `per_token_logps` | reference log-probability of each token | required |
| `outputs.token_kl` | as `per_token_logps` | k3 estimate of the KL to the reference, detached | with \
`ref_per_token_logps` |
| `outputs.old_per_token_logps` | (B, T) | log-probabilities at generation time, detached | policy: always |
| `outputs.pooled_hidden` | (2B, H) or (B, H) | mean last hidden state of the completion, float32, with gradient | \
required |
| `outputs.sequence_hidden` | (2B, H) or (B, H) | mean last hidden state of prompt and completion, float32, detached | \
required |
| `outputs.second_logits` | as `logits` | logits of a second pass with other dropout | preference: required |
| `outputs.logits` | (2B, T, V) or (B, T, V) | logits over temperature, with gradient: costs memory | required |
| `batch.columns[name]` | (B,) or list of B | data-set columns that the loss names in `columns` | declared |
| `batch.advantages` | (B, 1) or (B, T) | advantages | policy: always |
| `batch.rewards` | (B, F) | raw reward of each function, NaN where a function did not score | policy trainer |
| `batch.group_ids` | (B,) | which prompt of the generation batch a completion answers | policy trainer |
| `batch.prepared[name]` | (B, ...) | what the loss's `prepare(rollout)` returned | policy, with `prepare` |
| `batch.ranks` | | sums and gathers over the processes' micro-batches: collectives, for losses that must | always |

Preference rows are ordered chosen first, then rejected, so `x.chunk(2)` splits them. "Required" fields are computed
only when the loss names them in `requires`; reading one that was not required raises `MissingFieldError`.
"""

from __future__ import annotations

from .batches import PolicyBatch, PreferenceBatch
from .common import (
    REQUIREMENTS,
    ROLLOUT_REQUIREMENTS,
    Denominators,
    Family,
    Metric,
    Ranks,
    TokenReduction,
    gradients_of,
    masked_sum,
    slopes_of,
)
from .outputs import ModelOutputs
from .rollout import Rollout

__all__ = [
    "REQUIREMENTS",
    "ROLLOUT_REQUIREMENTS",
    "Denominators",
    "Family",
    "Metric",
    "ModelOutputs",
    "PolicyBatch",
    "PreferenceBatch",
    "Ranks",
    "Rollout",
    "TokenReduction",
    "gradients_of",
    "masked_sum",
    "slopes_of",
]
