"""The command itself: its parts, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import CheckpointError, LossConfigError
from .check import check
from .drawing import plot
from .environment import env, version
from .listing import list_losses
from .new import new
from .show import show
from .training import PASS_ON, dpo, grpo

_NAME = "trl-custom-losses"


class _Group(TyperGroup):
    """Ends with one line and exit code 1 on what a user can put right."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LossConfigError, CheckpointError) as error:
            if ctx.params.get("traceback"):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name=_NAME,
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{_NAME} {version()}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option("--traceback", envvar="TRL_CUSTOM_LOSSES_TRACEBACK", help="Show where an error comes from."),
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # DeepSpeed's launcher adds it
) -> None:
    """Losses for TRL's DPO and GRPO trainers: list, show, write, check, train with and draw them.

    Every command explains itself: trl-custom-losses COMMAND --help
    """


app.command("list")(list_losses)
app.command()(show)
app.command()(new)
app.command()(check)
app.command(context_settings=PASS_ON, add_help_option=False)(dpo)
app.command(context_settings=PASS_ON, add_help_option=False)(grpo)
app.command()(plot)
app.command()(env)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Words of the command line; None takes the program's own.
    """
    app(args=None if arguments is None else list(arguments), prog_name=_NAME)
