"""Losses on chosen/rejected pairs, one a module; the module's name is the name in the registry."""

from .aot import AOTLoss
from .aot_unpaired import AOTUnpairedLoss
from .apo_down import APODownLoss
from .apo_zero import APOZeroLoss
from .bco_pair import BCOPairLoss
from .discopop import DiscoPOPLoss
from .exo_pair import EXOPairLoss
from .hinge import HingeLoss
from .ipo import IPOLoss
from .log_ratio import LogRatioLoss
from .nca_pair import NCAPairLoss
from .robust import RobustLoss
from .score_difference import ScoreDifferenceLoss
from .sft import SFTLoss
from .sigmoid import SigmoidLoss
from .sigmoid_norm import SigmoidNormLoss
from .sppo_hard import SPPOHardLoss

__all__ = [
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "BCOPairLoss",
    "DiscoPOPLoss",
    "EXOPairLoss",
    "HingeLoss",
    "IPOLoss",
    "LogRatioLoss",
    "NCAPairLoss",
    "RobustLoss",
    "SFTLoss",
    "SPPOHardLoss",
    "ScoreDifferenceLoss",
    "SigmoidLoss",
    "SigmoidNormLoss",
]
