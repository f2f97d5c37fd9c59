"""The package's losses. Importing this module registers all of them."""

from . import policy, preference

__all__ = ["policy", "preference"]
