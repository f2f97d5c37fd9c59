"""`show`: the loss card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
import yaml

from ..cards import LossCard, loss_card
from ..hyperparameters import Hyperparameter
from ..registry import LossFunctionRegistry
from .files import look_here, refuse_paths
from .options import AsJson
from .output import bold, paragraph, print_json

_TRAINERS = {
    "preference": "a preference loss, for CustomDPOTrainer",
    "policy": "a policy loss, for CustomGRPOTrainer",
    None: "made of losses of either family",
}


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered name, or an import path 'module:loss'.")],
    as_json: AsJson = False,
) -> None:
    """Show what there is to know of a loss.

    Its formula, hyperparameters, needs, metrics, limits and source, and a config that builds.
    """
    look_here()
    refuse_paths(name, "show")
    card = loss_card(name)
    metrics = metrics_of(card)
    if as_json:
        print_json(card.to_dict() | {"metrics": metrics})
        return
    typer.echo("\n".join(_lines(card, metrics)))


def metrics_of(card: LossCard) -> list[str] | None:
    """Names of what the loss returns beside its value on random data; None if the card's config is missing."""
    from ..testing import random_data

    if card.config is None:
        return None
    loss = LossFunctionRegistry.build({**card.config, **LossFunctionRegistry.get(card.name).example})
    data = random_data(loss.family, size=max(4, loss.minimum_batch))
    _, metrics = loss(*data.build(loss, data.denominators()))
    return list(metrics)


def _lines(card: LossCard, metrics: list[str] | None) -> Iterator[str]:
    yield f"{bold(card.name)}: {_TRAINERS[card.family]}"
    yield ""
    yield paragraph(card.summary or "It has no docstring.")
    yield from _section("Formula", [f"  {line}" for line in card.formula.splitlines()])
    yield from _section("Hyperparameters", _hyperparameters(card))
    needs = [paragraph(f"{field}: {cost}", 2, 4) for field, cost in card.costs.items()]
    if card.rollout_requires:
        fields = ", ".join(card.rollout_requires)
        needs.append(paragraph(f"at each rollout, {fields}: a forward pass without gradient a generation batch", 2, 4))
    for column in card.columns:
        scored = " (where it is missing, a `scorer` can fill it)" if column in card.scored_columns else ""
        needs.append(paragraph(f"column {column}: of the data set{scored}", 2, 4))
    nothing = "what its parts need" if card.family is None else "nothing"
    yield from _section("Needs, beyond the policy's log-probabilities", needs or [f"  {nothing}"])
    if metrics is not None:
        yield from _section("Logs, beside TRL's metrics", [paragraph(", ".join(metrics) or "nothing", 2)])
    yield from _section("Notes", "\n\n".join(paragraph(note, 2) for note in card.notes).splitlines())
    limits = [paragraph(f"- {limit}", 2, 2) for limit in card.limits]
    if card.errors:
        limits.append(paragraph(f"- Refused: {_lower_first(card.errors)}", 2, 2))
    yield from _section("Limits", limits)
    links = [f"  https://arxiv.org/abs/{paper}" for paper in card.papers]
    yield from _section("Source", [paragraph(card.source, 2), *links] if card.source else [])
    if card.config is not None:
        block = yaml.safe_dump({"loss_function": card.config}, sort_keys=False, width=76)
        yield from _section("In a config", [f"  {line}" for line in block.splitlines()])
    else:
        missing = [name for name, parameter in card.hyperparameters.items() if parameter.required]
        yield ""
        yield paragraph(f"It has no `example` of {', '.join(missing)}, so it was not run.")


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", bold(title), *lines] if lines else []


def _hyperparameters(card: LossCard) -> list[str]:
    shown: list[str] = []
    unexplained: list[str] = []
    for name, parameter in card.hyperparameters.items():
        description = card.descriptions.get(name, "")
        if not description and parameter.annotation is Any and not parameter.required:
            unexplained.append(name)
            continue
        shown.append(paragraph(_signature(parameter), 2, 8))
        if description:
            shown.append(paragraph(description, 6))
    if unexplained:
        shown.append(paragraph(f"also, for some of the settings above: {', '.join(unexplained)}", 2, 4))
    return shown or ["  none"]


def _signature(parameter: Hyperparameter) -> str:
    default = ", required" if parameter.required else f" = {parameter.default!r}"
    return f"{parameter.name}: {parameter.type_name}{default}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:] if not text[1:2].isupper() else text
