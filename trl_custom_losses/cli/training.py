"""`dpo` and `grpo`: training as the arguments say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

#: Every word reaches TRL's parser, `--help` too.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

_LAUNCHING = """\
trl-custom-losses {name}: train with {trainer} and a loss from the registry.

  trl-custom-losses {name} --config recipe.yaml --learning_rate 1.0e-5
  accelerate launch --config_file recipes/accelerate/zero3.yaml -m trl_custom_losses {name} --config recipe.yaml
  deepspeed --num_gpus 8 --module trl_custom_losses {name} --config recipe.yaml --deepspeed recipes/deepspeed/zero3.json

The arguments are those of TRL's own script, in a YAML file, on the command line, or both, and `loss_function`:

  --loss_function ipo      --loss_function '{{"type": "ipo", "beta": 0.05}}'      --loss_function my_module:my_loss
"""


def dpo(context: typer.Context) -> None:
    """Train with DPO; takes TRL's arguments and loss_function."""
    from ..trainers.launch import train_dpo

    _train(context, train_dpo, "CustomDPOTrainer")


def grpo(context: typer.Context) -> None:
    """Train with GRPO; takes TRL's arguments and loss_function."""
    from ..trainers.launch import train_grpo

    _train(context, train_grpo, "CustomGRPOTrainer")


def _train(context: typer.Context, train: Callable[..., Any], trainer: str) -> None:
    from ..trainers.launch import end_rank

    name = str(context.info_name)
    if {"-h", "--help"} & set(context.args):
        typer.echo(_LAUNCHING.format(name=name, trainer=trainer))
    train(context.args, prog=f"trl-custom-losses {name}")
    end_rank()
