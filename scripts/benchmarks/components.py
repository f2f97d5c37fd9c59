"""What components and their balancing add to a step, against a single loss on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from trl_custom_losses import ModelOutputs
from trl_custom_losses.reductions import evaluate, reduce_loss
from trl_custom_losses.summaries import summarise
from trl_custom_losses.trainers.fused_head import fitted_head

from .measure import alternate, compare, interval, milliseconds, seconds, summary
from .workload import Workload, dpo_trainer, grpo_trainer, step_timer

AGGREGATORS = ("upgrad", "mgda", "pcgrad", "cagrad")

_ONE = "1 component"
_STEP = "optimizer steps of `trainer.train`: data, generation (GRPO), forward, reference (DPO), loss, backward, AdamW"
_FORWARD_BACKWARD = (
    "one batch at hand: forward, reference (DPO), loss, metrics, backward, and the hooks of a step's begin and end, "
    "where balancing finds its weights; neither data, generation nor optimizer"
)
_LOSS = (
    "of that the part that depends on the loss: from the log-probabilities of a batch to their gradients, the metrics "
    "as sums and counts, and the hooks"
)
_COSTS = {"step": "step", "forward_backward": "forward and backward", "loss": "loss"}


def preference_losses() -> list[dict[str, Any]]:
    """Five losses on the same log-ratios; the first one is what they are compared with."""
    return [
        {"type": "sigmoid"},
        {"type": "sft"},
        {"type": "ipo"},
        {"type": "hinge"},
        {"type": "robust", "label_smoothing": 0.1},
    ]


def policy_losses(longest: int) -> list[dict[str, Any]]:
    """Five surrogates, of completions of at most `longest` tokens; the first one is what they are compared with."""
    return [
        {"type": "grpo"},
        {"type": "dr_grpo", "max_completion_length": longest},
        {"type": "cispo"},
        {"type": "dapo"},
        {"type": "bnpo"},
    ]


def contenders(losses: list[dict[str, Any]], aggregators: tuple[str, ...] = AGGREGATORS) -> dict[str, dict[str, Any]]:
    """The first loss alone, and three and five in a composition, without balancing and with each aggregator."""
    found: dict[str, dict[str, Any]] = {_ONE: losses[0]}
    for count in (3, 5):
        composed = {"type": "composed", "components": losses[:count]}
        found[f"{count} components"] = composed
        found |= {f"{count} components, {name}": composed | {"balancing": name} for name in aggregators}
    return found


def run(
    work: Workload,
    rounds: int,
    steps: int,
    which: tuple[str, ...] = ("dpo", "grpo"),
    aggregators: tuple[str, ...] = AGGREGATORS,
) -> dict[str, Any]:
    """Seconds of a step, of its forward and backward pass and of its loss alone, with their ratios to one component.

    Args:
        work: Model and batches.
        rounds: Samples of each contender, taken alternately.
        steps: Optimizer steps, or forward and backward passes, of a sample; of the loss alone ten times as many.
        which: Trainers to measure.
        aggregators: Of the balanced compositions.
    """
    makers: dict[str, tuple[Callable[..., Trainer], list[dict[str, Any]]]] = {
        "dpo": (dpo_trainer, preference_losses()),
        "grpo": (grpo_trainer, policy_losses(work.completion)),
    }
    found: dict[str, Any] = {"contains": {"step": _STEP, "forward_backward": _FORWARD_BACKWARD, "loss": _LOSS}}
    for name in which:
        make, losses = makers[name]
        trainers = {key: make(work, loss) for key, loss in contenders(losses, aggregators).items()}
        step_timers = {key: step_timer(trainer, steps, 1, work.device) for key, trainer in trainers.items()}
        for timer in step_timers.values():
            timer()  # also leaves each trainer in the state that a batch by hand needs
        batch = batch_of(next(iter(trainers.values())))
        passes = {key: forward_backward(trainer, batch) for key, trainer in trainers.items()}
        losses_alone = {key: _loss_alone(trainer, batch) for key, trainer in trainers.items()}
        samples = {
            "step": alternate({key: timer for key, timer in step_timers.items() if _whole_steps(key)}, rounds),
            "forward_backward": alternate(_timers(passes, steps, work.device), rounds),
            "loss": alternate(_timers(losses_alone, 10 * steps, work.device), rounds),
        }
        found[name] = {"losses": losses} | {cost: _figures(values) for cost, values in samples.items()}
    return found


def table(result: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of what `run` returned, the first of them its head."""
    head = ["trainer", "loss"]
    for cost in _COSTS.values():
        head += [f"{cost}, ms", f"{cost}, x of one component"]
    rows = [head]
    for name in ("dpo", "grpo"):
        for key in result.get(name, {}).get("loss", {}):
            rows.append([name, key])
            for cost in _COSTS:
                figures = result[name][cost].get(key)
                time = "" if figures is None else milliseconds(figures["seconds"])
                rows[-1] += [time, "" if figures is None else interval(figures["ratio"])]
    return rows


def batch_of(trainer: Trainer) -> dict[str, Any]:
    """A batch that all contenders get, so that none has longer texts than another."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def forward_backward(
    trainer: Trainer, batch: Mapping[str, Any], backward: Callable[..., None] = Tensor.backward
) -> Callable[[], None]:
    """All of an optimizer step but data, generation and optimizer, by a trainer that has trained.

    Args:
        trainer: It, in training mode.
        batch: What its data collator or generation made.
        backward: Differentiates the loss that it is given, `total`.
    """
    model, hooks, state = trainer.model, trainer.callback_handler, trainer.state
    model.train()

    def one() -> None:
        hooks.on_step_begin(trainer.args, state, trainer.control)
        with fitted_head(model):  # as within `train`
            backward(trainer.compute_loss(model, batch))
        state.global_step += 1
        hooks.on_step_end(trainer.args, state, trainer.control)
        model.zero_grad()

    return one


def _figures(samples: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Seconds of each contender and their ratio to one component; of a balanced one also to the same unbalanced."""
    found: dict[str, dict[str, Any]] = {}
    for key, values in samples.items():
        found[key] = {"seconds": summary(values), "ratio": compare(samples, key, _ONE)}
        unbalanced, balanced, _ = key.partition(",")
        if balanced:
            found[key]["ratio_to_unbalanced"] = compare(samples, key, unbalanced)
    return found


def _whole_steps(key: str) -> bool:
    """Whether a contender's whole steps are timed: they vary more than balancing of three components costs."""
    return not key.startswith("3 components,")


def _timers(calls: Mapping[str, Callable[[], None]], repeats: int, device: str) -> dict[str, Callable[[], float]]:
    return {key: partial(seconds, call, repeats, 1, device) for key, call in calls.items()}


def _loss_alone(trainer: Trainer, batch: dict[str, Any]) -> Callable[[], None]:
    """The loss on what one forward pass gave, its gradient there, and its part of a step's hooks."""
    loss, hooks, state = trainer.loss_function, trainer.callback_handler, trainer.state
    seen: list[Any] = []
    handle = loss.register_forward_hook(lambda module, arguments, result: seen.extend(arguments))
    trainer.compute_loss(trainer.model, batch)
    handle.remove()
    data, outputs = seen
    fields = {name: value.detach() for name, value in vars(outputs).items()}
    for name in ("per_token_logps", "entropies"):
        fields[name].requires_grad_()

    def one() -> None:
        hooks.on_step_begin(trainer.args, state, trainer.control)
        # Made anew, as a step does, so that what it keeps between components is computed again.
        given = ModelOutputs(**fields)
        raw, metrics = evaluate(loss, data, given)
        total = reduce_loss(loss, raw, data)
        summarise(metrics, data.mask, loss.name)
        torch.autograd.grad(total, [fields["per_token_logps"], fields["entropies"]], allow_unused=True)
        state.global_step += 1
        hooks.on_step_end(trainer.args, state, trainer.control)

    return one
