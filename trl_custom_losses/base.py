"""What a loss inherits: `PreferenceLoss` or `PolicyLoss`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .hyperparameters import Hyperparameter, hyperparameters_of
from .schedules import Schedule
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

    Losses form a tree: a composition yields its parts from `components`. What happens in a run reaches every loss of
    the tree through `on_train_begin`, `on_step_begin` and `on_step_end`, once per optimizer step and in training only;
    a loss overrides those it needs. What it tells `observe` in its forward pass comes back in `on_step_end`, summed
    over the step's micro-batches and ranks, so that what it decides from that is the same on every rank.

    Class attributes, all optional, that a loss sets to declare facts about itself:

    Attributes:
        family: "preference" or "policy".
        requires: Fields of the model outputs or the batch that the trainer must compute (see `types`).
        rollout_requires: What `Rollout.forward()` must hold (see `types.ROLLOUT_REQUIREMENTS`).
        columns: Data-set columns that must reach the loss.
        column_scorers: Which of these the trainer can fill where a data set lacks them: column -> (column of texts,
            import path of a function that takes a list of texts and returns a list of numbers from 0 to 1).
        aliases: Other names of hyperparameters, alias -> name.
        reduction: How an unreduced loss becomes a scalar (see `reductions`).
        batch_coupled: Whether a pair's or sequence's loss depends on the others of the micro-batch, so that
            splitting a batch changes the result.
        minimum_batch: Pairs or sequences that a micro-batch, over all ranks, must hold for the loss to do anything.
        pair_weighting: How WPO weights act: "pair" multiplies each pair's loss by its weight, "mean" multiplies the
            loss by the micro-batch's mean weight (what TRL does for losses that are not per pair).
        f_divergence: Whether `f_divergence_type` other than reverse KL is honoured ("hyperparameter": the loss has
            the argument; "independent": its value does not depend on it; "unsupported").
        surrogate: Whether a policy loss is a policy-gradient surrogate, to which off-policy masks, high-entropy
            masks and vLLM ratios apply; auxiliary terms set False.
        uses_importance_sampling_ratio: Whether the loss applies the vLLM ratio itself.
        composite: Whether the loss has reduced its components itself.
        stop_gradient: Whether parts of the loss are detached on purpose, so that its gradient is not the derivative of
            its value (CISPO's importance weights).
        prefers_chosen: Whether a preference loss, while the policy is the reference, falls as chosen completions become
            likelier and rejected ones less; False for auxiliary terms, and where data-set columns decide.
        example: Hyperparameters to show the loss with, in checks, cards and pictures: values for those without a
            default, and in place of defaults with which it would do nothing there.
        column_examples: Values of data-set columns for its checks, where numbers from 0 to 1 would not do.
    """

    family: Family | None = None
    requires: frozenset[str] | set[str] = frozenset()
    rollout_requires: frozenset[str] | set[str] = frozenset()
    columns: tuple[str, ...] = ()
    column_scorers: Mapping[str, tuple[str, str]] = {}
    aliases: Mapping[str, str] = {}
    reduction: str | TokenReduction = "sequence_mean"
    batch_coupled: bool = False
    minimum_batch: int = 1
    pair_weighting: str = "pair"
    f_divergence: str = "unsupported"
    surrogate: bool = False
    uses_importance_sampling_ratio: bool = False
    composite: bool = False
    stop_gradient: bool = False
    prefers_chosen: bool = True
    example: Mapping[str, Any] = {}
    column_examples: Mapping[str, Sequence[Any]] = {}
    #: The registry sets the name a loss was built under, where each hyperparameter's value came from, and which of them
    #: move.
    name: str = ""
    origins: Mapping[str, str] = {}
    schedules: Mapping[str, Schedule] = {}
    #: A monitor sets `watched` for the optimizer steps whose gradients it wants to know (see
    #: `callbacks.GradientMonitorCallback`); a composition that observes its components' gradients sets `watches_parts`.
    watched = False
    watches_parts = False

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

    def components(self) -> Iterator[tuple[str, Loss]]:
        """The losses that this one is made of, by name; none unless it is a composition."""
        return iter(())

    def leaves(self) -> list[Loss]:
        """The losses that compute something: this one, or a composition's components, depth first."""
        leaves = [leaf for _, component in self.components() for leaf in component.leaves()]
        return leaves or [self]

    def tree(self) -> list[Loss]:
        """This loss and all that it is made of, depth first."""
        return [self, *(loss for _, component in self.components() for loss in component.tree())]

    @property
    def prepares(self) -> bool:
        """Whether the loss wants to see rollouts (policy losses that override `prepare`)."""
        return False

    @property
    def kl_reduction(self) -> str | TokenReduction:
        """How the trainer reduces the KL term that it adds around this loss."""
        return self.reduction

    # The run

    def on_train_begin(self, total_steps: int) -> None:
        """Training begins, or goes on from a checkpoint, and will end after `total_steps` optimizer steps."""

    def on_step_begin(self, step: int) -> None:
        """An optimizer step begins; `step` of them are done."""

    def on_step_end(self, step: int, observed: Mapping[str, Tensor]) -> Mapping[str, float] | None:
        """An optimizer step was taken.

        Args:
            step: Number of optimizer steps done before it.
            observed: What this loss told `observe`, summed over micro-batches and ranks: float64, on the host. Equal on
                all ranks.

        Returns:
            Metrics to log, if any; they must be equal on all ranks.
        """

    def begin_run(self, total_steps: int, done: int = 0) -> None:
        """Tell this loss and all that it is made of that training begins, or goes on; for whoever drives the root.

        Args:
            total_steps: Optimizer steps after which it will end.
            done: How many of them are done.
        """
        for loss in self.tree():
            for schedule in loss.schedules.values():
                schedule.begin(total_steps)
            loss.take_observed()  # of a run that was stopped
            loss.on_train_begin(total_steps)
            loss.move_to_step(done)  # for an evaluation before the first step

    def begin_step(self, step: int) -> None:
        """Tell this loss and all that it is made of that an optimizer step begins; for whoever drives the root.

        Args:
            step: Number of steps done before.
        """
        tree = self.tree()
        for loss in tree:
            loss.move_to_step(step)
        for loss in tree:  # a parent's hook may set what its parts have just been given, so it comes after
            loss.on_step_begin(step)

    def observe(self, name: str, values: Tensor) -> None:
        """Add `values` to this step's sum of `name`, for `on_step_end`; nothing happens outside of training.

        Args:
            name: Of the sum.
            values: Of any shape; names and shapes are the same on all ranks and micro-batches. For a mean, give totals
                and counts.
        """
        if not self.training:
            return
        sums = self.__dict__.setdefault("_observed", {})
        # Two booleans add up to one, and half precision loses counts; a copy, since a loss may move its own tensors.
        kind = torch.float32 if values.is_floating_point() else torch.int64
        values = values.detach().to(torch.promote_types(values.dtype, kind), copy=True)
        if name in sums and sums[name].shape != values.shape:
            raise ValueError(
                f"loss '{self.name}' observes '{name}' in the shapes {tuple(sums[name].shape)} and "
                f"{tuple(values.shape)}, which cannot be added up"
            )
        sums[name] = sums[name] + values if name in sums else values

    @property
    def watching(self) -> bool:
        """Whether a monitor wants to know the gradients of this forward pass."""
        return self.watched and self.training and torch.is_grad_enabled()

    @property
    def observes(self) -> bool:
        """Whether what is observed matters to this loss; the driver sums over ranks if it does to any of a tree."""
        return getattr(self.on_step_end, "__func__", None) is not Loss.on_step_end

    def observed_so_far(self) -> dict[str, Tensor]:
        """As `take_observed`, but it stays and can be added to."""
        return dict(self.__dict__.get("_observed", {}))

    def take_observed(self) -> dict[str, Tensor]:
        """What was observed since the last call, on the device, of this rank; for the driver."""
        return self.__dict__.pop("_observed", {})

    def move_to_step(self, step: int) -> None:
        """Set what follows from the step and the state, such as scheduled hyperparameters; for the driver.

        Called before an optimizer step, and before an evaluation that comes first.
        """
        for name, schedule in self.schedules.items():
            setattr(self.owner_of(name), name, schedule.value(step))

    def moving(self) -> dict[str, float]:
        """Scheduled hyperparameters and the values they have now."""
        return {name: getattr(self.owner_of(name), name) for name in self.schedules}

    def owner_of(self, name: str) -> Any:
        """The object whose attribute the hyperparameter `name` is."""
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """The resolved hyperparameters by name, as far as they are kept as attributes, or their schedules."""
        owners = {name: self.owner_of(name) for name in self.origins}
        values = {name: getattr(owner, name) for name, owner in owners.items() if hasattr(owner, name)}
        # What a composition was built from is described by its parts.
        values = {
            k: value for k, value in values.items() if not (inspect.ismethod(value) or isinstance(value, nn.Module))
        }
        return values | dict(self.schedules)

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
