"""What pushes a model: gradients of a loss's components, clipped sequences, gradients of the model's layers."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base import Loss
from ..errors import LossConfigError

logger = logging.getLogger(__name__)

Log = Callable[[Mapping[str, float | Tensor]], None]

#: Launchers under which every process holds whole gradients, averaged over the processes.
_WHOLE_GRADIENTS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
#: Optimizers that use a gradient up during the backward pass, by parts of their names.
_USES_GRADIENTS_UP = ("lomo", "layerwise")
#: What peft puts between a module's name and its parameters'.
_WITHIN_ADAPTER = re.compile(r"\.(?:lora_|modules_to_save\.)")
#: The first number in a parameter's name is that of its layer.
_NUMBERED = re.compile(r"^(?P<container>.+?)\.(?P<number>\d+)\.")


class GradientMonitorCallback(TrainerCallback):
    """Logs which component of a loss drives the model, every `every` optimizer steps.

    `CustomDPOTrainer(..., callbacks=[GradientMonitorCallback(every=50, layers=True)])`, or `trainer.add_callback(...)`;
    the same for GRPO. The values are in the Trainer's next log, as means over the monitored steps since the one before:

    | metric | meaning |
    |---|---|
    | `grad_norm/<component>` | norm of a component's gradient before its weight |
    | `grad_norm_weighted/<component>` | the same times its weight, with the factor of balancing |
    | `grad_norm/total` | norm of the weighted sum, before clipping by an enclosing `clipped_loss`: below the weighted \
norms' sum, components oppose each other |
    | `grad_cosine/<a>/<b>` | cosine between two components' gradients (balancing logs it at every step by itself) |
    | `grad_norm/<loss>` | of a trainer's loss that is no weighted sum, the norm of its gradient: of a `clipped_loss`, \
after clipping. Alone, unless there is a composition within |
    | `clipped_sequences` | share of sequences with a token whose importance ratio lies beyond a bound that acts; \
tokens that TRL's masks drop do not count. Absent where a loss does not clip (`clipped_loss` has `clip_fraction`) |
    | `grad_norm_layer/<layer>` | with `layers`, norm of the gradient of a layer's trained parameters |

    Gradients of components are those with respect to the tensors through which a loss reaches the model: per-token
    log-probabilities (units of the loss per nat), entropies and pooled hidden states, or logits where the loss requires
    those. They are of the whole optimizer step, however it is split into micro-batches and over processes, and of the
    loss alone, without what the trainer adds around it (KL term, entropy bonus, MoE loss).

    A composition within another loss reports its own components, before and with their weights in it, under names that
    begin with its place: `in/grad_norm/pref` is of `pref` in the component `in`, `base/grad_norm/total` of the
    composition that a `clipped_loss` clips. The cosines that balancing logs have no place in their name, unless a loss
    around has a component of one of the same names.

    Gradients of layers are the model's own, as the optimizer gets them: averaged over processes and after the Trainer's
    clipping, so that the squares add up to at most `max_grad_norm` squared. A layer is named after its place
    ("layers.0"), the token embeddings are "embedding" (with a head that is tied to them), the output projection is
    "head", and other parameters are named after their module. Adapters count for the layer that they sit in.

    Neither the loss nor any gradient changes by a bit. In a monitored step each component costs one more backward pass
    through the loss, from its value to the tensors named above, never through the model, and memory for one gradient of
    their size: small for log-probabilities, large for logits where the loss requires those. A few numbers join the sum
    over processes that losses share; where no loss observes anything, a monitored step adds that sum, one small
    collective and one wait of the host. `layers` adds one pass over the gradients.

    On the quick start's model, small as it is, a monitored step took 1 % more CPU time, with `layers` 1 % to 2 % (2 CPU
    cores without a GPU, 2026-11-22). Other steps, and evaluation, cost nothing.

    Args:
        every: Monitor the optimizer steps whose number, counted from 1 as in the Trainer's logs, it divides.
        layers: Whether to log `grad_norm_layer/*` too.

    Raises:
        LossConfigError: `every` or `layers` is malformed; or, when training begins, the trainer has no loss function,
            it has two of these callbacks, or `layers` is asked for where no process holds whole gradients (DeepSpeed,
            FSDP, tensor parallelism) or an optimizer has used them up.
    """

    def __init__(self, every: int = 50, layers: bool = False) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise LossConfigError(f"'every': expected a number of optimizer steps, at least 1, found {every!r}")
        if not isinstance(layers, bool):
            raise LossConfigError(f"'layers': expected true or false, found {layers!r}")
        self.every = every
        self.layers = layers
        self._given: tuple[Loss, Accelerator, Log] | None = None

    def attach(self, loss: Loss, accelerator: Accelerator, log: Log) -> None:
        """Give it what it monitors; a trainer does so before it trains.

        Args:
            loss: The trainer's loss.
            accelerator: Of the trainer.
            log: Takes metrics that are equal on all processes.
        """
        self._given = loss, accelerator, log

    def detach(self) -> None:
        """Let go of the loss, and leave it as it was."""
        if self._given is not None:
            self._watch(self._given[0], False)
        self._given = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._given is None:
            raise LossConfigError(
                "GradientMonitorCallback looks into the loss of a CustomDPOTrainer or CustomGRPOTrainer and needs one "
                "with a `loss_function`; this trainer has none and uses its own objective"
            )
        if self.layers:
            _check_whole_gradients(self._given[1], args, kwargs["model"])
        if state.max_steps // self.every == state.global_step // self.every:
            logger.warning(
                "GradientMonitorCallback(every=%d) will monitor nothing: this run ends after step %d",
                self.every,
                state.max_steps,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Left as it is at the step's end: whichever callback comes first there, the driver must still see it.
        self._watch(self._given[0], self._is_due(state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.layers and self._is_due(state):
            _, accelerator, log = self._given
            norms = layer_norms(kwargs["model"], accelerator.device)
            log({f"grad_norm_layer/{layer}": norm for layer, norm in norms.items()})

    def _is_due(self, state: TrainerState) -> bool:
        """Whether the step under way is monitored; the Trainer counts it at its end."""
        return (state.global_step + 1) % self.every == 0

    @staticmethod
    def _watch(loss: Loss, watched: bool) -> None:
        for part in loss.tree():
            part.watched = watched


@contextmanager
def monitored(
    callbacks: Iterable[TrainerCallback], loss: Loss | None, accelerator: Accelerator, log: Log
) -> Iterator[None]:
    """Attach the monitor among a trainer's callbacks, if there is one, for as long as the trainer trains.

    Raises:
        LossConfigError: There are two of them.
    """
    monitors = [callback for callback in callbacks if isinstance(callback, GradientMonitorCallback)]
    if len(monitors) > 1:
        raise LossConfigError(f"a trainer takes one GradientMonitorCallback, found {len(monitors)}")
    try:
        if loss is not None:
            for monitor in monitors:
                monitor.attach(loss, accelerator, log)
        yield
    finally:
        for monitor in monitors:
            monitor.detach()


def layer_norms(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Norm of the gradient of each layer's trained parameters, in their order, scalars on `device`; nothing waits.

    Raises:
        RuntimeError: No parameter has a gradient.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if all(parameter.grad is None for parameter in trained.values()):
        raise RuntimeError(
            f"GradientMonitorCallback(layers=True) needs gradients of the model's parameters, but none of the "
            f"{len(trained)} trained ones has any before the optimizer's step"
        )
    norms = defaultdict(list)
    for name, layer in name_layers(model, trained).items():
        gradient = trained[name].grad
        # Half precision would round the norm, and overflow in its square.
        norm = torch.zeros(()) if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float32)
        norms[layer].append(norm.to(device))
    return {layer: torch.linalg.vector_norm(torch.stack(parts)) for layer, parts in norms.items()}


def name_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The layer of each of the named parameters; see `GradientMonitorCallback`."""
    ends = {}
    for end, module in (("head", _part(model, "output")), ("embedding", _part(model, "input"))):
        ends |= {f"{name}.": end for name, found in model.named_modules() if module is not None and found is module}
    numbered = {name: match for name in names if (match := _NUMBERED.match(name))}
    containers = Counter(_last(container) for container in {match["container"] for match in numbered.values()})

    def layer_of(name: str) -> str:
        end = next((end for prefix, end in ends.items() if name.startswith(prefix)), None)
        if end is not None:
            return end
        if name in numbered:
            container, number = numbered[name]["container"], numbered[name]["number"]
            # A vision tower and a language model may both have "layers".
            return f"{_last(container) if containers[_last(container)] == 1 else container}.{number}"
        module = _WITHIN_ADAPTER.split(name)[0]
        return _last(module if module != name else name.rpartition(".")[0]) or name

    return {name: layer_of(name) for name in names}


def _part(model: nn.Module, which: str) -> nn.Module | None:
    """The module of the token embeddings ("input") or the output projection ("output"), if the model tells."""
    get = getattr(model, f"get_{which}_embeddings", None)
    return get() if callable(get) else None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def uses_gradients_up(optimizer: str) -> bool:
    """Whether an optimizer, by its name in the Trainer's arguments, moves parameters during the backward pass."""
    return any(part in str(getattr(optimizer, "value", optimizer)) for part in _USES_GRADIENTS_UP)


def _check_whole_gradients(accelerator: Accelerator, args: TrainingArguments, model: nn.Module) -> None:
    """Refuse to look for gradients of parameters where they are not to be found."""
    what = "GradientMonitorCallback(layers=True) needs whole gradients of the model's parameters on every process"
    remedy = "; leave `layers` out, the rest works"
    launcher = accelerator.distributed_type.value
    if launcher not in _WHOLE_GRADIENTS:
        raise LossConfigError(f"{what}, found {launcher}, which shards or hides them{remedy}")
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise LossConfigError(f"{what}, found {len(sharded)} sharded parameters, such as '{sharded[0]}'{remedy}")
    if uses_gradients_up(args.optim):
        optimizer = getattr(args.optim, "value", args.optim)
        raise LossConfigError(f"{what}, found the optimizer '{optimizer}', which uses them up beforehand{remedy}")


__all__ = ["GradientMonitorCallback", "layer_norms", "monitored", "name_layers", "uses_gradients_up"]
