"""Loss cards: what a loss's docstring, signature and declarations say, in one object. The README's table is made of
them, and what the command line shows."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from .base import Loss
from .hyperparameters import Hyperparameter
from .registry import LossFunctionRegistry
from .types import Family

_SECTION = re.compile(r"^(Args|Errors|Source|Raises|Returns|Attributes):")
#: A description that sends the reader to another loss's docstring.
_REFERENCE = re.compile(r"(?:^|\()(?:[Ss]ee|As for) `\w+`")
_ARGUMENT = re.compile(r"^(\*{0,2}\w+(?:, \w+)*):\s*(.*)$")


#: What each field of `requires` is, and what the trainer does for it.
COSTS = {
    "ref_logps": "log-probability of each completion under the reference: a forward pass without gradient each step, "
    "or one before training with `precompute_ref_log_probs`; the reference is a second model, with LoRA the base model",
    "ref_per_token_logps": "the same of each token: a forward pass of the reference without gradient",
    "old_per_token_logps": "log-probabilities at generation time: a forward pass without gradient, none where a "
    "rollout serves a single optimizer step",
    "entropies": "entropy of each next-token distribution, with gradient: part of the forward pass",
    "pooled_hidden": "mean last hidden state of each completion, with gradient: part of the forward pass",
    "sequence_hidden": "mean last hidden state of prompt and completion, no gradient: part of the forward pass",
    "logits": "logits of every completion token, with gradient: memory for rows x tokens x vocabulary in float32",
    "second_logits": "logits of a second pass with other dropout: twice the time and memory of the first",
    "rewards": "raw reward of each function: at hand",
    "group_ids": "which prompt a completion answers: at hand",
}


@dataclass(frozen=True)
class LossCard:
    """What there is to know of a registered loss before using it.

    Args:
        name: Name in the registry.
        family: "preference", "policy", or None for a composition of either.
        summary: First paragraph of the docstring.
        formula: The lines of its second paragraph.
        notes: The paragraphs after that.
        source: What follows "Source:", usually papers.
        errors: What follows "Errors:", what it refuses beyond wrong types and ranges.
        hyperparameters: By name.
        descriptions: What the docstring says of them, by name.
        config: A `loss_function` block that builds; None if the loss has hyperparameters without a default and no
            `example` of them.
        requires: Fields it makes the trainer compute; those of `config`, where they depend on hyperparameters.
        rollout_requires: Fields it needs when a generation batch is prepared.
        columns: Data-set columns it needs.
        scored_columns: Those of them that the trainer can fill.
        limits: What follows for a run from what the loss declares.
    """

    name: str
    family: Family | None
    summary: str
    formula: str
    notes: tuple[str, ...]
    source: str
    errors: str
    hyperparameters: dict[str, Hyperparameter]
    descriptions: dict[str, str]
    config: dict[str, Any] | None
    requires: tuple[str, ...]
    rollout_requires: tuple[str, ...]
    columns: tuple[str, ...]
    scored_columns: tuple[str, ...]
    limits: tuple[str, ...]

    @property
    def papers(self) -> list[str]:
        """arXiv ids in the source."""
        return re.findall(r"arXiv:(\d{4}\.\d{5})", self.source)

    @property
    def costs(self) -> dict[str, str]:
        """What each required field is and costs."""
        return {name: COSTS[name] for name in self.requires}

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON can hold it."""
        return {
            "name": self.name,
            "family": self.family,
            "summary": self.summary,
            "formula": [line.strip() for line in self.formula.splitlines()],
            "notes": list(self.notes),
            "hyperparameters": [
                {
                    "name": name,
                    "type": parameter.type_name,
                    "required": parameter.required,
                    "default": None if parameter.required else parameter.default,
                    "description": self.descriptions.get(name, ""),
                }
                for name, parameter in self.hyperparameters.items()
            ],
            "requires": list(self.requires),
            "rollout_requires": list(self.rollout_requires),
            "costs": self.costs,
            "columns": list(self.columns),
            "scored_columns": list(self.scored_columns),
            "limits": list(self.limits),
            "errors": self.errors,
            "source": self.source,
            "papers": self.papers,
            "loss_function": self.config,
        }


def loss_card(name: str) -> LossCard:
    """The card of the loss registered under `name`, or named by an import path.

    Raises:
        LossConfigError: There is no such loss, or its own `example` does not build.
    """
    loss_class = LossFunctionRegistry.get(name)
    prose, sections = _read(loss_class.__doc__)
    has_formula = len(prose) > 1 and "=" in prose[1]
    config = example_config(name)
    # What a loss needs may depend on its hyperparameters. Of a composition of either family nothing can be said.
    loss: Loss | type[Loss] = loss_class
    if config is not None and loss_class.family is not None:
        loss = LossFunctionRegistry.build({**config, **loss_class.example})
    return LossCard(
        name=name,
        family=loss_class.family,
        summary=_one_line(prose[0]) if prose else "",
        formula=prose[1] if has_formula else "",
        notes=tuple(map(_one_line, prose[2 if has_formula else 1 :])),
        source=_one_line(sections.get("Source", "")),
        errors=_one_line(sections.get("Errors", "")),
        hyperparameters=loss_class.declared_hyperparameters(),
        descriptions=_descriptions(loss_class),
        config=config,
        requires=tuple(sorted(loss.requires)),
        rollout_requires=tuple(sorted(loss.rollout_requires)),
        columns=tuple(loss.columns),
        scored_columns=tuple(column for column in loss.columns if column in loss.column_scorers),
        limits=tuple(limits_of(loss)),
    )


def example_config(name: str) -> dict[str, Any] | None:
    """A `loss_function` block of the loss: its defaults, and its `example` where there are none.

    Returns:
        The block, which builds; None where a value is missing.
    """
    loss_class = LossFunctionRegistry.get(name)
    declared = loss_class.declared_hyperparameters()
    config: dict[str, Any] = {"type": name}
    for key, parameter in declared.items():
        default = None if parameter.required else parameter.default
        value = loss_class.example.get(key) if default is None else default
        if value is not None:
            config[key] = value
    return None if any(p.required and key not in config for key, p in declared.items()) else config


def _read(docstring: str | None) -> tuple[list[str], dict[str, str]]:
    """The paragraphs of a docstring, and its sections by title."""
    paragraphs = [p for p in re.split(r"\n\s*\n", inspect.cleandoc(docstring or "")) if p]
    sections = {m[1]: p.removeprefix(m[0]) for p in paragraphs if (m := _SECTION.match(p))}
    return [p for p in paragraphs if not _SECTION.match(p)], sections


def _descriptions(loss_class: type[Loss]) -> dict[str, str]:
    """What the docstrings of the loss and its bases say of each argument; the nearest that says it itself."""
    found: dict[str, str] = {}
    for base in loss_class.__mro__:
        if base is Loss:
            break
        for name, text in _described(_read(vars(base).get("__doc__"))[1].get("Args", "")).items():
            if name not in found or (_REFERENCE.search(found[name]) and not _REFERENCE.search(text)):
                found[name] = text
    return found


def _described(section: str) -> dict[str, str]:
    """The entries of an "Args:" section; "a, b: text" describes both."""
    entries: dict[str, list[str]] = {}
    names: list[str] = []
    lines = section.strip("\n").splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        entry = _ARGUMENT.match(line[indent:])
        if entry:
            names = entry[1].split(", ")
        for name in names:
            entries.setdefault(name, []).append(entry[2] if entry else line.strip())
    return {name: _one_line(" ".join(text)) for name, text in entries.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def limits_of(loss: Loss | type[Loss]) -> list[str]:
    """What follows for a run from what a loss declares, a sentence each."""
    leaves = loss.leaves() if isinstance(loss, Loss) else [loss]
    unit = "pairs" if loss.family == "preference" else "sequences"
    limits = []
    if loss.batch_coupled:
        limits.append(
            f"The {unit} of a micro-batch influence one another: the result depends on how a batch is split, and "
            "`use_weighting` is refused."
            if loss.family == "preference"
            else f"The {unit} of a micro-batch influence one another: the result depends on how a batch is split."
        )
    if any(leaf.reduction == "local_token_mean" for leaf in leaves):
        limits.append("It averages within each micro-batch: the result depends on how a batch is split.")
    if loss.minimum_batch > 1:
        limits.append(f"A micro-batch must hold at least {loss.minimum_batch} {unit}, over all devices.")
    if loss.family == "preference" and any(leaf.f_divergence == "unsupported" for leaf in leaves):
        limits.append("`f_divergence_type` must stay 'reverse_kl'.")
    averaging = [leaf for leaf in leaves if leaf.pair_weighting == "mean"]
    if averaging:
        which = f" of {names}" if (names := _names_of(averaging, loss)) else ""
        limits.append(f"`use_weighting` multiplies the value{which} by the mean weight of a micro-batch.")
    if "ref_per_token_logps" in loss.requires:
        limits.append(
            "`precompute_ref_log_probs` must stay off: it keeps sums over completions alone."
            if loss.family == "preference"
            else "There is a reference model also at `beta: 0`, where TRL needs none."
        )
    if "logits" in loss.requires:
        limits.append("The logits stay in memory until the backward pass: lower the micro-batch if it runs out.")
    others = [leaf for leaf in leaves if not leaf.surrogate]
    if loss.family == "policy" and others:
        which = "it" if len(others) == len(leaves) else _names_of(others, loss)
        limits.append(f"Off-policy masks, high-entropy masks and vLLM's ratios do not act on {which}.")
    if any(leaf.uses_importance_sampling_ratio for leaf in leaves):
        limits.append("With vLLM, `vllm_importance_sampling_mode` must be 'token_truncate' or 'token_mask'.")
    if any(leaf.stop_gradient for leaf in leaves):
        limits.append("Its gradient is not the derivative of its value, on purpose.")
    return limits


def _names_of(leaves: list[Any], loss: Any) -> str:
    return ", ".join(f"'{leaf.name}'" for leaf in leaves if leaf is not loss)


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
