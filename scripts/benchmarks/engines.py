"""Balancing from log-probabilities against TorchJD, which aggregates the Jacobian of the parameters.

Not the same weights: ours come from the Gramians of previous steps, of log-probabilities (this micro-batch's own with
`gramian: current`), TorchJD's from this batch's, of the parameters. TorchJD differentiates the losses one after another
here; with a head that allows vmap it was slower all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from trl_custom_losses import ComposableLossFunction, LossConfigError, LossFunctionRegistry

from .components import AGGREGATORS, batch_of, forward_backward, policy_losses, preference_losses
from .measure import alternate, compare, interval, milliseconds, peak_memory, seconds, summary
from .workload import Workload, dpo_trainer, grpo_trainer

#: With an explicit reference, whose forward pass both ways need; with its log-probabilities in the data; without one.
WHICH = ("dpo", "dpo, reference precomputed", "grpo")

_SUM = "plain sum"
_CONTAINS = (
    "one batch at hand: forward, reference (DPO), three losses, metrics, weights, and one gradient of the parameters "
    "in `.grad`; neither data, generation nor optimizer"
)
_TOLERANCE = 1e-5
_MISSING = "the case needs TorchJD and its solvers: pip install 'torchjd[cagrad,quadprog_projector]>=0.18,<0.19'"


class Parts(ComposableLossFunction):
    """A composition that keeps its components' contributions to the last micro-batch, with their graph, in `parts`."""

    def contributions(self, batch: Any, outputs: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        contributions, reported = super().contributions(batch, outputs)
        self.parts = list(contributions.values())
        return contributions, reported


def run(
    work: Workload,
    rounds: int,
    steps: int,
    which: tuple[str, ...] = WHICH,
    aggregators: tuple[str, ...] = AGGREGATORS,
) -> dict[str, Any]:
    """Seconds and peak memory of a gradient of three balanced objectives, ours and TorchJD's.

    Args:
        work: Model and batches.
        rounds: Samples of each contender, taken alternately.
        steps: Gradients of a sample.
        which: Trainers whose forward pass and losses are taken.
        aggregators: To balance by.

    Raises:
        LossConfigError: TorchJD is not installed.
        RuntimeError: The two ways do not differentiate the same losses of the same parameters.
    """
    if find_spec("torchjd") is None:
        raise LossConfigError(_MISSING)
    families = {
        "dpo": (dpo_trainer, preference_losses()[:3]),
        "dpo, reference precomputed": (
            partial(dpo_trainer, precompute_ref_log_probs=True),
            preference_losses()[:3],
        ),
        "grpo": (grpo_trainer, policy_losses(work.completion)[:3]),
    }
    return {"contains": _CONTAINS} | {
        name: _measured(work, *families[name], rounds, steps, aggregators) for name in which
    }


def table(result: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of what `run` returned, the first of them its head."""
    rows = [["trainer", "", "ms", "x of the plain sum", "TorchJD's time over ours", "peak memory, MB"]]
    for trainer in WHICH:
        for key, figures in result.get(trainer, {}).get("contenders", {}).items():
            faster = figures.get("torchjd_over_ours")
            rows.append(
                [
                    trainer,
                    key,
                    milliseconds(figures["seconds"]),
                    interval(figures["ratio_to_sum"]),
                    "" if faster is None else interval(faster),
                    f"{figures['peak_memory'] / 1e6:.1f}",
                ]
            )
    return rows


def _measured(
    work: Workload,
    make: Callable[..., Trainer],
    losses: list[dict[str, Any]],
    rounds: int,
    steps: int,
    aggregators: tuple[str, ...],
) -> dict[str, Any]:
    plain = _trainer(work, make, losses, None)
    batch = batch_of(plain)
    trainers = {f"ours, {name}": _trainer(work, make, losses, name) for name in aggregators}
    current = {"type": aggregators[0], "gramian": "current"}
    trainers[f"ours, {aggregators[0]}, gramian: current"] = _trainer(work, make, losses, current)
    for key, trainer in trainers.items():
        _check_losses(key, _parts(trainer, batch), _parts(plain, batch))
    at_once = _works_at_once(plain, batch)
    _check_gradient(plain, batch, at_once)

    calls = {_SUM: forward_backward(plain, batch)}
    calls |= {key: forward_backward(trainer, batch) for key, trainer in trainers.items()}
    for name in aggregators:
        peer = partial(_torchjd_backward, plain, _aggregator(name), at_once, False)
        calls[f"torchjd, {name}"] = forward_backward(plain, batch, peer)
    samples = alternate({key: partial(seconds, call, steps, 1, work.device) for key, call in calls.items()}, rounds)
    found: dict[str, Any] = {}
    for key, values in samples.items():
        found[key] = {"seconds": summary(values), "ratio_to_sum": compare(samples, key, _SUM)}
        found[key]["peak_memory"] = peak_memory(calls[key], work.device)
        if key.startswith("ours"):
            found[key]["torchjd_over_ours"] = compare(samples, f"torchjd, {key.split(', ')[1]}", key)
    for name in aggregators:
        lean = forward_backward(plain, batch, partial(_torchjd_backward, plain, _aggregator(name), at_once, True))
        memory = peak_memory(lean, work.device)
        found[f"torchjd, {name}"]["peak_memory_with_its_gramian_by_tensor"] = memory
    rows = "all at once, by vmap" if at_once else "one after another, since the model's head refuses vmap"
    return {"losses": losses, "torchjd_rows": rows, "contenders": found}


def _trainer(work: Workload, make: Callable[..., Trainer], losses: list[dict[str, Any]], balancing: Any) -> Trainer:
    built = {loss["type"]: LossFunctionRegistry.build(loss) for loss in losses}
    trainer = make(work, Parts(built, balancing=balancing))
    trainer.args.max_steps = 2
    trainer.train()
    # Back to where all began, so that all see the same losses.
    trainer.model.load_state_dict(work.new_model().state_dict())
    return trainer


def _parts(trainer: Trainer, batch: Mapping[str, Any]) -> list[Tensor]:
    trainer.compute_loss(trainer.model, dict(batch))
    return trainer.loss_function.parts


def _check_losses(key: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
        if not torch.isclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * 1e-2):
            raise RuntimeError(f"loss {number} of '{key}' is not TorchJD's: {float(one)}, {float(other)}")


def _aggregator(name: str) -> Any:
    from torchjd import aggregation

    makers = {
        "upgrad": aggregation.UPGrad,
        "mgda": aggregation.MGDA,
        "pcgrad": aggregation.PCGrad,
        "cagrad": partial(aggregation.CAGrad, c=0.5),  # our default
        "sum": aggregation.Sum,
    }
    try:
        return makers[name]()
    except ImportError as error:
        raise LossConfigError(_MISSING) from error


def _torchjd_backward(
    trainer: Trainer, aggregator: Any, at_once: bool, by_tensor: bool, total: Tensor | None = None
) -> None:
    """TorchJD's Jacobian of the parts of the last micro-batch, aggregated into the parameters' gradients.

    Args:
        trainer: Of a loss that keeps its parts.
        aggregator: TorchJD's.
        at_once: Whether it differentiates all parts by one pass under vmap.
        by_tensor: Whether its Gramian is made parameter by parameter, which saves the copy of all of them.
        total: The trainer's loss, which is not differentiated.
    """
    from torchjd.autojac import backward, jac_to_grad

    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    backward(trainer.loss_function.parts, inputs=parameters, parallel_chunk_size=None if at_once else 1)
    jac_to_grad(parameters, aggregator, **({"optimize_gramian_computation": True} if by_tensor else {}))


def _works_at_once(trainer: Trainer, batch: Mapping[str, Any]) -> bool:
    """Whether TorchJD can differentiate all losses by one pass, which its engine does unless told otherwise."""
    _parts(trainer, batch)
    try:
        _torchjd_backward(trainer, _aggregator("sum"), at_once=True, by_tensor=False)
    except RuntimeError:  # what vmap raises
        return False
    finally:
        trainer.model.zero_grad()
        for parameter in trainer.model.parameters():
            if hasattr(parameter, "jac"):
                del parameter.jac
    return True


def _check_gradient(trainer: Trainer, batch: Mapping[str, Any], at_once: bool) -> None:
    """Refuse a comparison in which the sum of TorchJD's rows is not the gradient of the sum."""
    parameters = list(trainer.model.parameters())
    found = []
    for differentiate in (Tensor.backward, partial(_torchjd_backward, trainer, _aggregator("sum"), at_once, False)):
        differentiate(trainer.compute_loss(trainer.model, dict(batch)))
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        trainer.model.zero_grad()
    error = float((found[0] - found[1]).norm() / found[0].norm())
    if not error < 1e2 * _TOLERANCE:
        raise RuntimeError(f"TorchJD's Jacobian does not add up to the gradient of the sum: off by {error:.2g} of it")
