"""Losses on chosen/rejected pairs, one a module; the module's name is the name in the registry."""

from .adaptive_dpo import AdaptiveDPOLoss
from .aot import AOTLoss
from .aot_unpaired import AOTUnpairedLoss
from .apo_down import APODownLoss
from .apo_zero import APOZeroLoss
from .bco_pair import BCOPairLoss
from .bfpo import BFPOLoss
from .discopop import DiscoPOPLoss
from .exo_pair import EXOPairLoss
from .hinge import HingeLoss
from .ipo import IPOLoss
from .log_ratio import LogRatioLoss
from .nca_pair import NCAPairLoss
from .robust import RobustLoss
from .safe_dpo import SafeDPOLoss
from .score_difference import ScoreDifferenceLoss
from .sft import SFTLoss
from .sigmoid import SigmoidLoss
from .sigmoid_norm import SigmoidNormLoss
from .sppo_hard import SPPOHardLoss
from .unsafe_labels import UNSAFE_COLUMNS

__all__ = [
    "UNSAFE_COLUMNS",
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "AdaptiveDPOLoss",
    "BCOPairLoss",
    "BFPOLoss",
    "DiscoPOPLoss",
    "EXOPairLoss",
    "HingeLoss",
    "IPOLoss",
    "LogRatioLoss",
    "NCAPairLoss",
    "RobustLoss",
    "SFTLoss",
    "SPPOHardLoss",
    "SafeDPOLoss",
    "ScoreDifferenceLoss",
    "SigmoidLoss",
    "SigmoidNormLoss",
]
