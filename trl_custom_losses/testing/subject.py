"""From what a user hands over to a loss that can be built again and again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..base import Loss
from ..errors import LossConfigError
from ..hyperparameters import Hyperparameter
from ..registry import BuildContext, LossFunctionRegistry
from ..types import Family
from .batches import Data
from .random_data import random_data


@dataclass(frozen=True)
class Subject:
    """A loss under check.

    Args:
        name: Of the loss.
        as_built: Makes a new one; takes hyperparameters to change. A loss given as an object takes none.
        hyperparameters: It declares, by name; none for a loss given as an object.
        given_object: Whether it was given as an object, so that copies of that stand for new ones.
    """

    name: str
    as_built: Callable[..., Loss]
    hyperparameters: Mapping[str, Hyperparameter]
    given_object: bool = False

    def build(self, **changed: Any) -> Loss:
        """A new one for data in float64, as most checks use: what it keeps in float32 is moved to float64."""
        return self.as_built(**changed).double()

    @property
    def family(self) -> Family:
        """Of the loss."""
        return self.build().family

    def data(self, *, size: int = 4, length: int = 5, **options: Any) -> Data:
        """Random data of at least as many pairs or sequences as the loss needs (see `random_data`)."""
        loss = self.build()
        return random_data(loss.family, size=max(size, loss.minimum_batch), length=length, **options)


def subject_of(loss: Any, hyperparameters: Mapping[str, Any], family: Family | None = None) -> Subject:
    """What is to be checked.

    Args:
        loss: A registered name, an import path, a config with `type`, a class, a function or a loss object.
        hyperparameters: For it; where there are none, or one without a default is missing, those of its `example`.
        family: For a function that does not say its own, and for messages.

    Raises:
        LossConfigError: It is no loss, or rejects its hyperparameters.
    """
    context = BuildContext(family=family)
    if isinstance(loss, Mapping):
        if not isinstance(loss.get("type"), str):
            raise LossConfigError(f"a loss's config has a 'type', the name of the loss; found {dict(loss)!r}")
        hyperparameters = {**{key: value for key, value in loss.items() if key != "type"}, **hyperparameters}
        loss = loss["type"]
    if isinstance(loss, str):
        name, loss_class = loss, LossFunctionRegistry.find(loss, family)
    elif inspect.isclass(loss) or inspect.isroutine(loss):
        loss_class = LossFunctionRegistry.class_of(loss, family)
        name = LossFunctionRegistry.name_of(loss_class)
    else:
        return _given_object(loss, hyperparameters, context)
    declared = loss_class.declared_hyperparameters()
    given = LossFunctionRegistry.with_example(loss_class, hyperparameters, name)

    def build(**changed: Any) -> Loss:
        # From one state of the random numbers, so that two that are built are alike.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            config = copy.deepcopy({**given, **changed})  # it may hold loss objects
            built = LossFunctionRegistry.build_class(loss_class, config, name=name, context=context)
        return LossFunctionRegistry.build(built, context=context)  # which checks what it declares

    return Subject(name, build, declared)


def _given_object(loss: Any, hyperparameters: Mapping[str, Any], context: BuildContext) -> Subject:
    if hyperparameters:
        raise LossConfigError(
            f"hyperparameters {sorted(hyperparameters)} are given for a loss object, which has its own; give the class"
        )
    built = LossFunctionRegistry.build(loss, context=context)
    return Subject(built.name, lambda: copy.deepcopy(built), {}, given_object=True)
