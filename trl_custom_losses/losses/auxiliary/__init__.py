"""Terms that stand beside a main loss, one a module; the module's name is the name in the registry."""

from .consistency import ConsistencyLoss
from .diversity import DiversityLoss
from .perplexity import PerplexityLoss
from .quality import QualityLoss
from .safety import SafetyLoss

__all__ = ["ConsistencyLoss", "DiversityLoss", "PerplexityLoss", "QualityLoss", "SafetyLoss"]
