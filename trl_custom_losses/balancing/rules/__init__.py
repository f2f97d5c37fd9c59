"""Rules by which the weights of several objectives move, once per optimizer step.

| name | weight | after its objective's loss fell |
|---|---|---|
| `trend` | times 1 +- adaptation_rate by the sign of the loss's trend | grows |
| `dwa` | initial times K softmax(loss / loss before) | falls, against the others |
| `softadapt` | initial times K softmax(beta slope) | falls, against the others |
| `relobralo` | initial times an average of K softmax(loss / loss before) and K softmax(loss / first loss) | falls |
| `constraint` | Lagrange multiplier of loss <= target | falls while below the target |
| `uncertainty` | learned, near 1 / loss | grows |

All but `uncertainty`, which is part of the loss and trained with it, are a `WeightRule`.
"""

from __future__ import annotations

from torch import nn

from .constraint import ConstraintWeights
from .dwa import DWAWeights
from .relobralo import ReLoBRaLoWeights
from .rule import WeightRule
from .softadapt import SoftAdaptWeights
from .trend import TrendWeights
from .uncertainty import UncertaintyWeights

RULES: dict[str, type[nn.Module]] = {
    "trend": TrendWeights,
    "dwa": DWAWeights,
    "softadapt": SoftAdaptWeights,
    "relobralo": ReLoBRaLoWeights,
    "constraint": ConstraintWeights,
    "uncertainty": UncertaintyWeights,
}

__all__ = [
    "RULES",
    "ConstraintWeights",
    "DWAWeights",
    "ReLoBRaLoWeights",
    "SoftAdaptWeights",
    "TrendWeights",
    "UncertaintyWeights",
    "WeightRule",
]
