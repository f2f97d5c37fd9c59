"""What a loss inherits: `PreferenceLoss`, `PolicyLoss`, and the wrapper that makes a plain function a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from .hyperparameters import Hyperparameter, hyperparameters_of, signature
from .types import Family, Metric, ModelOutputs, PolicyBatch, PreferenceBatch, Rollout, TokenReduction

Metrics = Mapping[str, Tensor | Metric]


@runtime_checkable
class LossFunction(Protocol):
    """The contract of every loss: `(batch, model_outputs) -> (loss, metrics)`.

    `loss` is unreduced, (B,) per pair or sequence or (B, T) per token, and then reduced by the framework with global
    denominators; or a scalar, which is taken as the mean of the micro-batch. `metrics` are detached tensors.
    """

    def __call__(self, batch: Any, model_outputs: Any) -> tuple[Tensor, Metrics]: ...


class Loss(nn.Module):
    """Base of both families. Hyperparameters are keyword-only constructor arguments kept as attributes of the same
    name; state is buffers.

    Class attributes, all optional, that a loss sets to declare facts about itself:

    Attributes:
        family: "preference" or "policy".
        requires: Fields of the model outputs or the batch that the trainer must compute (see `types`).
        columns: Data-set columns that must reach the loss.
        reduction: How an unreduced loss becomes a scalar (see `reductions`).
        batch_coupled: Whether a pair's or sequence's loss depends on the others of the micro-batch, so that
            splitting a batch changes the result.
        pair_weighting: How WPO weights act: "pair" multiplies each pair's loss by its weight, "mean" multiplies the
            loss by the micro-batch's mean weight (what TRL does for losses that are not per pair).
        f_divergence: Whether `f_divergence_type` other than reverse KL is honoured ("hyperparameter": the loss has
            the argument; "independent": its value does not depend on it; "unsupported").
        surrogate: Whether a policy loss is a policy-gradient surrogate, to which off-policy masks, high-entropy
            masks and vLLM ratios apply; auxiliary terms set False.
        uses_importance_sampling_ratio: Whether the loss applies the vLLM ratio itself.
        composite: Whether the loss has reduced its components itself.
    """

    family: Family | None = None
    requires: frozenset[str] | set[str] = frozenset()
    columns: tuple[str, ...] = ()
    reduction: str | TokenReduction = "sequence_mean"
    batch_coupled: bool = False
    pair_weighting: str = "pair"
    f_divergence: str = "unsupported"
    surrogate: bool = False
    uses_importance_sampling_ratio: bool = False
    composite: bool = False
    #: The registry sets the name a loss was built under and where each hyperparameter's value came from.
    name: str = ""
    origins: Mapping[str, str] = {}

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        raise TypeError(f"{type(self).__name__} must define `forward(batch, model_outputs) -> (loss, metrics)`")

    @classmethod
    def declared_hyperparameters(cls) -> dict[str, Hyperparameter]:
        """What the loss takes, by name."""
        return hyperparameters_of(cls)

    @classmethod
    def from_hyperparameters(cls, values: Mapping[str, Any], context: Any) -> Loss:
        """Make the loss from checked values; compositions build their components with `context` here."""
        return cls(**values)

    def leaves(self) -> list[Loss]:
        """The losses that compute something: this one, or a composition's components, depth first."""
        return [self]

    @property
    def prepares(self) -> bool:
        """Whether the loss wants to see rollouts (policy losses that override `prepare`)."""
        return False

    @property
    def kl_reduction(self) -> str | TokenReduction:
        """How the trainer reduces the KL term that it adds around this loss."""
        return self.reduction

    def hyperparameters(self) -> dict[str, Any]:
        """The resolved hyperparameters by name, as far as they are kept as attributes."""
        return {name: getattr(self, name) for name in self.origins if hasattr(self, name)}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters().items())


class PreferenceLoss(Loss):
    """A loss on a batch of B chosen/rejected pairs: `forward(batch: PreferenceBatch, outputs: ModelOutputs)`.

    Return (B,) per pair, (B, T) per token of the chosen completions, (2B,) or (2B, T) for all completions, or a
    scalar, with a dict of metrics.
    """

    family = "preference"

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return super().forward(batch, model_outputs)


class PolicyLoss(Loss):
    """A loss on a batch of B sampled completions: `forward(batch: PolicyBatch, outputs: ModelOutputs)`.

    Return (B, T) or (B, 1) for a surrogate, anything the reductions take for an auxiliary term. The trainer adds
    around it, once, what TRL's options ask for: KL term, off-policy and high-entropy masks, vLLM ratios, entropy
    bonus, MoE auxiliary loss.
    """

    family = "policy"
    surrogate = True
    reduction: str | TokenReduction = "token_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return super().forward(batch, model_outputs)

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        """Compute tensors once per generation batch, while whole prompt groups are together.

        Returns:
            Tensors whose first dimension is this rank's sequences; each reaches the loss as `batch.prepared[name]`.
            A tensor named "advantages" replaces the trainer's advantages.
        """
        return {}

    @property
    def prepares(self) -> bool:
        """Whether this loss overrides `prepare`."""
        return type(self).prepare is not PolicyLoss.prepare


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

    def hyperparameters(self) -> dict[str, Any]:
        return {name: getattr(self.object, name) for name in self.origins if hasattr(self.object, name)}

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
