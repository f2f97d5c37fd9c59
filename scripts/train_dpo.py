"""Train with DPO and a loss from the registry.

    python scripts/train_dpo.py --config recipes/dpo/RECIPE.yaml [--any_argument value ...]
    accelerate launch scripts/train_dpo.py --config recipes/dpo/RECIPE.yaml

Takes the arguments of TRL's own script and `loss_function`, so an existing YAML file works with that one key added.
Run with --help for all of them.
"""

from __future__ import annotations

from trl_custom_losses.trainers.launch import exit_with_message
from trl_custom_losses.trainers.launch import train_dpo as main

if __name__ == "__main__":
    exit_with_message(main)
