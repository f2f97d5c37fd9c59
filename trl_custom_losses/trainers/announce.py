"""What is said of the loss when training starts."""

from __future__ import annotations

import logging
from typing import Any

from ..base import Loss
from ..hyperparameters import NOT_ITS_OWN
from ..registry import GIVEN_OBJECT
from .config import is_set, objective_fields

logger = logging.getLogger("trl_custom_losses")


def describe(loss: Loss) -> str:
    """The loss and all that it is made of, one a line, with every resolved hyperparameter and where it came from."""
    return "\n".join(_line(name, part) for name, part in named_tree(loss))


def _line(name: str, loss: Loss) -> str:
    label = loss.name if name in ("", loss.name) else f"{name} ({loss.name})"
    if loss.composite:  # what it holds follows; its own hyperparameters describe that
        return f"  {label}: {loss.extra_repr()}"
    values = ", ".join(f"{key}={value!r} ({loss.origins[key]})" for key, value in loss.hyperparameters().items())
    return f"  {label}: {values or 'no hyperparameters'}"


def named_tree(loss: Loss, name: str = "") -> list[tuple[str, Loss]]:
    """The losses of a tree, depth first, with the names of the components they are, "outer/inner"."""
    return [
        (name, loss),
        *(
            part
            for component, child in loss.components()
            for part in named_tree(child, f"{name}/{component}" if name else component)
        ),
    ]


def surprises(loss: Loss, config: Any) -> list[str]:
    """What a user may not expect of how hyperparameters were resolved."""
    messages, fields = [], objective_fields(config)
    for _, leaf in named_tree(loss):
        if getattr(leaf, "learns", False) and any(part.surrogate for part in leaf.leaves()):
            messages.append(
                f"loss '{leaf.name}': the rule 'uncertainty' raises the weight of a loss that is 0 or negative up to "
                "its bound, and a policy surrogate is about 0; `constraint` or `trend` with a `signal` do not"
            )
        for name, value in leaf.hyperparameters().items():
            origin = leaf.origins[name]
            if NOT_ITS_OWN in origin:
                messages.append(
                    f"loss '{leaf.name}': {name}={value!r} is {origin}. Give `{name}` in `loss_function` to choose."
                )
            elif origin == GIVEN_OBJECT and name in fields and is_set(config, name):
                wanted = getattr(config, name)
                if wanted != value:
                    messages.append(
                        f"loss '{leaf.name}': the given object has {name}={value!r}; the config's {name}={wanted!r} "
                        "does not act on it."
                    )
    return messages


class _FallbackHandler(logging.StreamHandler):
    """Shows the package's messages where the program has not set up logging; otherwise leaves them to it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


if not logger.handlers:
    logger.addHandler(_FallbackHandler())
    logger.setLevel(logging.INFO)
