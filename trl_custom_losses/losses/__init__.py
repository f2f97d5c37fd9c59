"""The package's losses. Importing this module registers all of them."""

from . import auxiliary, composite, policy, preference

__all__ = ["auxiliary", "composite", "policy", "preference"]
