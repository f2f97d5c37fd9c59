"""What does not inherit from `Loss`, made a loss: plain functions and objects that can be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from .base import Loss, Metrics, PolicyLoss, PreferenceLoss
from .hyperparameters import Hyperparameter, hyperparameters_of, signature
from .types import Family, ModelOutputs, PolicyBatch, PreferenceBatch


class FunctionLoss(Loss):
    """A plain function `f(batch, outputs, *, beta=0.1)` as a loss; its keyword-only arguments are hyperparameters.

    Subclasses, one a function, are made by `LossFunctionRegistry.register` and hold it as `function`.
    """

    function: ClassVar[Callable[..., tuple[Tensor, Metrics]]]

    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        self._names = tuple(hyperparameters)
        for name, value in hyperparameters.items():
            setattr(self, name, value)

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        # Read at call time, so that a scheduled hyperparameter reaches the function.
        return type(self).function(batch, model_outputs, **{name: getattr(self, name) for name in self._names})

    @classmethod
    def declared_hyperparameters(cls) -> dict[str, Hyperparameter]:
        return hyperparameters_of(cls.function)

    @classmethod
    def wrap(cls, function: Callable[..., Any], facts: Mapping[str, Any]) -> type[FunctionLoss]:
        """Make the class for `function`, with `facts` as the class attributes of `Loss`."""
        return _subclass(cls, function, facts, function=staticmethod(function))


def _subclass(base: type[Loss], origin: Any, facts: Mapping[str, Any], **attributes: Any) -> type:
    """A class between `base` and the family's base, named after what it wraps."""
    family_base = {"preference": PreferenceLoss, "policy": PolicyLoss}.get(facts.get("family"))
    attributes |= {"__doc__": origin.__doc__, "__module__": origin.__module__, **facts}
    return type(origin.__name__, (base,) if family_base is None else (base, family_base), attributes)


class ObjectLoss(Loss):
    """Any object with `__call__(batch, outputs)` as a loss; subclasses hold its class as `wrapped`."""

    wrapped: ClassVar[type]

    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        self.object = self.wrapped(**hyperparameters)

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return self.object(batch, model_outputs)

    @classmethod
    def declared_hyperparameters(cls) -> dict[str, Hyperparameter]:
        return hyperparameters_of(cls.wrapped)

    def owner_of(self, name: str) -> Any:
        return self.object

    @property
    def observes(self) -> bool:
        """Whether the object hears of a step's end."""
        return hasattr(self.object, "on_step_end")

    def on_train_begin(self, total_steps: int) -> None:
        self._pass_on("on_train_begin", total_steps)

    def on_step_begin(self, step: int) -> None:
        self._pass_on("on_step_begin", step)

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> Mapping[str, float] | None:
        return self._pass_on("on_step_end", step, observed)

    def _pass_on(self, event: str, *arguments: Any) -> Any:
        hook = getattr(self.object, event, None)
        return None if hook is None else hook(*arguments)

    @classmethod
    def wrap(cls, wrapped: type, facts: Mapping[str, Any]) -> type[ObjectLoss]:
        """Make the class for `wrapped`, with `facts` as the class attributes of `Loss`."""
        attributes: dict[str, Any] = {"wrapped": wrapped}
        if hasattr(wrapped, "prepare"):
            attributes["prepare"] = lambda self, rollout: self.object.prepare(rollout)
        return _subclass(cls, wrapped, facts, **attributes)

    @classmethod
    def hold(cls, instance: Any) -> ObjectLoss:
        """The loss around an object that exists already."""
        loss = cls.__new__(cls)
        Loss.__init__(loss)
        loss.object = instance
        return loss


def annotated_family(function: Callable[..., Any]) -> Family | None:
    """The family that a function's first argument is annotated with, if it is."""
    parameters = list(signature(function).parameters.values())
    annotation = parameters[0].annotation if parameters else None
    for batch_type in (PreferenceBatch, PolicyBatch):
        if annotation is batch_type or annotation == batch_type.__name__:
            return batch_type.family
    return None
