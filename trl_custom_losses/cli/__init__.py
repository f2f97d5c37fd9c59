"""The command `trl-custom-losses`: losses listed, shown, written, checked, trained with and drawn."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
