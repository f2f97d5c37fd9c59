"""Gradient aggregators: objectives' weights from the inner products of their gradients.

| name | direction of the step | random |
|---|---|---|
| `upgrad` | sum of the gradients, each projected where it raises no other loss | no |
| `mgda` | shortest vector of the gradients' convex hull | no |
| `pcgrad` | sum of the gradients, each projected against the others one after another | order, for three or more |
| `cagrad` | near the mean gradient, best for the objective that gains least | no |

Weights are relative to the plain sum of the objectives: weights of ones leave the sum as it is.
"""

from __future__ import annotations

from .aggregator import Aggregator
from .cagrad import CAGrad
from .mgda import MGDA
from .pcgrad import PCGrad
from .upgrad import UPGrad

AGGREGATORS: dict[str, type[Aggregator]] = {"upgrad": UPGrad, "mgda": MGDA, "pcgrad": PCGrad, "cagrad": CAGrad}

__all__ = ["AGGREGATORS", "MGDA", "Aggregator", "CAGrad", "PCGrad", "UPGrad"]
