"""`list`: the registered losses, one a line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..cards import LossCard, loss_card
from ..registry import LossFunctionRegistry
from ..types import REQUIREMENTS
from .options import AsJson, FamilyName
from .output import print_json, table, terminal_width


def list_losses(
    family: Annotated[FamilyName | None, typer.Option(help="Only losses that this trainer's family takes.")] = None,
    needs: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Only losses that need this of the trainer; may be repeated."),
    ] = None,
    columns: Annotated[bool, typer.Option("--columns", help="Only losses that need data-set columns.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the registered losses; filters combine.

    What a loss needs may depend on its hyperparameters; these are the needs with the values that `show` names.
    Compositions of either family need what their parts need, and are in no list by needs or columns.
    """
    known = sorted(frozenset().union(*REQUIREMENTS.values()))
    for field in needs or []:
        if field not in known:
            raise typer.BadParameter(
                f"no trainer computes '{field}'; there are {', '.join(known)}", param_hint="--needs"
            )
    cards = [loss_card(name) for name in LossFunctionRegistry.names(None if family is None else family.value)]
    cards = [card for card in cards if set(needs or []) <= set(card.requires) and (card.columns or not columns)]
    if as_json:
        fields = ("name", "family", "summary", "requires", "rollout_requires", "columns", "papers", "source")
        whole = [card.to_dict() for card in cards]
        print_json([{field: card[field] for field in fields} for card in whole])
        return
    if not cards:
        typer.echo("No registered loss is like that.")
        return
    rows = [_row(card) for card in cards]
    typer.echo(
        table(("loss", "family", "paper", "needs"), rows, terminal_width(), beneath=[card.summary for card in cards])
    )
    if sys.stdout.isatty():
        typer.echo(f"\n{len(cards)} of {len(LossFunctionRegistry.names())}. One in full: trl-custom-losses show NAME")


def _row(card: LossCard) -> tuple[str, ...]:
    needs = [*card.requires, *(f"column {column}" for column in card.columns)]
    if card.family is None:
        needs = ["what its parts need"]
    return card.name, card.family or "either", card.papers[0] if card.papers else "-", ", ".join(needs) or "-"
