"""Reward functions for GRPO in TRL's form, named in a recipe as `trl_custom_losses.rewards:NAME`."""

from .reasoning_gym import reasoning_gym_reward

__all__ = ["reasoning_gym_reward"]
