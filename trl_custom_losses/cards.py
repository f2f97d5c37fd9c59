"""Loss cards: what a loss's docstring, signature and declarations say, in one object. The README's table is made of
them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from .hyperparameters import Hyperparameter
from .registry import LossFunctionRegistry
from .types import Family


@dataclass(frozen=True)
class LossCard:
    """What there is to know of a registered loss before using it.

    Args:
        name: Name in the registry.
        family: "preference", "policy", or None for a composition of either.
        summary: First paragraph of the docstring.
        formula: The lines of its second paragraph.
        source: What follows "Source:", usually papers.
        hyperparameters: By name.
        requires: Fields it makes the trainer compute.
        columns: Data-set columns it needs.
    """

    name: str
    family: Family | None
    summary: str
    formula: str
    source: str
    hyperparameters: dict[str, Hyperparameter]
    requires: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def papers(self) -> list[str]:
        """arXiv ids in the source."""
        return re.findall(r"arXiv:(\d{4}\.\d{5})", self.source)


def loss_card(name: str) -> LossCard:
    """The card of the loss registered under `name`, or named by an import path."""
    loss_class = LossFunctionRegistry.get(name)
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(loss_class.__doc__ or ""))
    source = next((p.removeprefix("Source:") for p in paragraphs if p.startswith("Source:")), "")
    has_formula = len(paragraphs) > 1 and "=" in paragraphs[1] and not paragraphs[1].startswith(("Args:", "Source:"))
    return LossCard(
        name=name,
        family=loss_class.family,
        summary=_one_line(paragraphs[0]),
        formula=paragraphs[1] if has_formula else "",
        source=_one_line(source),
        hyperparameters=loss_class.declared_hyperparameters(),
        requires=tuple(sorted(loss_class.requires)),
        columns=tuple(loss_class.columns),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def markdown_table() -> str:
    """All registered losses as the README shows them: name, family, formula, paper."""
    order = {"preference": 0, "policy": 1, None: 2}
    cards = sorted(map(loss_card, LossFunctionRegistry.names()), key=lambda card: (order[card.family], card.name))
    rows = ["| loss | family | formula | paper |", "|---|---|---|---|"]
    for card in cards:
        formula = "<br>".join(f"`{line.strip()}`" for line in card.formula.splitlines()).replace("|", "\\|")
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in card.papers) or card.source
        rows.append(f"| `{card.name}` | {card.family or 'either'} | {formula} | {papers} |")
    return "\n".join(rows)
