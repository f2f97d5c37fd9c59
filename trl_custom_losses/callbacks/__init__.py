"""Callbacks of the Trainer."""

from __future__ import annotations

from .driver import LossFunctionCallback
from .gradient_monitor import GradientMonitorCallback
from .run_report import RunReportCallback

__all__ = ["GradientMonitorCallback", "LossFunctionCallback", "RunReportCallback"]
