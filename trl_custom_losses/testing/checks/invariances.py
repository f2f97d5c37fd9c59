"""What must not matter: padding, order, and how a batch is split."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...base import Loss
from ...registry import LossFunctionRegistry
from ...types import Ranks
from ..batches import Data
from ..check import check, fail, require_equal
from ..ranks import on_ranks, prepared_on_ranks
from ..subject import Subject


def _require_same(whole: Data, loss: Loss, total: Tensor, what: str, versus: str = "of the whole batch it is") -> None:
    """`total`, computed from parts of `whole` or made from it otherwise, has the same value and gradients."""
    expected = whole.loss(loss)
    require_equal(total, expected, f"the loss {what}", versus=versus)
    for name, gradient in whole.gradients(loss, expected).items():
        found = whole.gradients(loss, total)[name]
        require_equal(found, gradient, f"the gradient (rows '{name}') {what}", versus=versus)


@check(
    usual_cause="a mean over positions divides by their number instead of `outputs.lengths`, or the reduction does; "
    "`outputs.mask` tells which positions are scored. Completions need not begin at position 0, nor be without gaps",
)
def padding(subject: Subject) -> None:
    """Positions that are not scored change nothing: padding, prompts, and results of tools."""
    data = subject.data()
    # A prompt precedes the completions of pairs; results of tools stand within sampled completions.
    other, where = (0, "of a prompt") if data.family == "preference" else (1, "within the completions")
    for at, which in ((None, "at the end"), (other, where)):
        for count in (1, 7):
            total = data.padded(count, -3.0, at).loss(subject.build())
            _require_same(data, subject.build(), total, f"with {count} unscored positions {which}", "without it is")


@check(
    usual_cause="rows are compared with their neighbours, or chosen and rejected rows are told apart other than by "
    "`chunk(2)`",
)
def permutation(subject: Subject) -> None:
    """The order of pairs or sequences does not matter."""
    data = subject.data()
    order = [*range(1, data.size, 2), *range(0, data.size, 2)]  # neighbours part, which a reversal leaves
    total = data.take(order).loss(subject.build())
    _require_same(
        data, subject.build(), total, "of the pairs or sequences in another order", "in the first order it is"
    )


def _normalised_locally(loss: Loss) -> bool:
    """Whether token means are taken within micro-batches, as that reduction says."""
    return any(leaf.reduction == "local_token_mean" for leaf in loss.leaves())


@check(
    usual_cause="the loss averages over the micro-batch itself (return it unreduced), compares pairs or sequences "
    "with one "
    "another (declare `batch_coupled = True`), or groups completions in `forward` (do it in `prepare`)",
)
def micro_batches(subject: Subject) -> str | None:
    """The micro-batches of an optimizer step add up to the whole, unless the loss declares `batch_coupled`; with the
    reduction `local_token_mean`, the loss is the mean of theirs.
    """
    data = subject.data()
    parts = [[0], list(range(1, data.size))]
    loss = subject.build()
    if loss.batch_coupled:
        _split(data, loss, [list(range(data.size))], "")
        return "`batch_coupled = True`: micro-batches do not add up"
    if loss.composite and _normalised_locally(loss):
        for leaf in loss.leaves():  # a sum of global and local means is neither
            _split(data, leaf, parts, f" of '{leaf.name}'")
    else:
        _split(data, loss, parts, "")
    return None


def _split(data: Data, loss: Loss, parts: list[list[int]], of: str) -> None:
    contributions = [
        data.take(part).loss(loss, data.denominators(micro_batches=len(parts), share=len(part) / data.size))
        for part in parts
    ]
    total = torch.stack(contributions).sum()
    if not _normalised_locally(loss):
        _require_same(data, loss, total, f"summed over {len(parts)} micro-batches{of}")
        return
    own = torch.stack([data.take(part).loss(loss) for part in parts]).mean()
    require_equal(total, own, f"the loss summed over micro-batches{of}", versus="the mean of their own losses is")


@check(
    usual_cause="a mean, a sort or a baseline over the micro-batch: declare `batch_coupled = True`, or move it to "
    "`prepare`, where the whole generation batch is seen",
)
def batch_coupling(subject: Subject) -> str | None:
    """A pair's or sequence's loss depends on the others of its micro-batch if, and only if, `batch_coupled` says so."""
    loss, data = subject.build(), subject.data()
    if loss.composite:  # a scalar; its components are checked one by one
        for leaf in loss.leaves():
            if not leaf.composite and leaf.family == data.family and leaf.minimum_batch == 1:
                _coupling(data, leaf)
        return None
    if loss.minimum_batch > 1:
        return f"`minimum_batch = {loss.minimum_batch}`: it need not run on one row"
    _coupling(data, loss)
    return None


def _coupling(data: Data, loss: Loss) -> None:
    raw, _ = loss(*data.build(loss))
    if raw.dim() == 0:
        return  # the micro-batches tell
    alone = torch.stack([loss(*data.take([index]).build(loss))[0] for index in range(data.size)])
    alone = alone.transpose(0, 1).flatten(0, 1)  # chosen rows first
    changed = ~((raw - alone).abs() <= 1e-8 + 1e-6 * raw.abs())  # NaN alone is a change
    if loss.batch_coupled and not changed.any():
        fail(f"'{loss.name}' declares `batch_coupled = True`, but each row's loss is the same without the other rows")
    if not loss.batch_coupled and changed.any():
        row = int(changed.reshape(changed.size(0), -1).any(1).nonzero()[0])
        together, apart = float(raw[row].reshape(-1)[0]), float(alone[row].reshape(-1)[0])
        fail(
            f"'{loss.name}' declares `batch_coupled = False`, but the loss of row {row} is {together:.8g} among the "
            f"others and {apart:.8g} alone"
        )


@check(
    usual_cause="a count or a mean is taken over this rank alone, or a collective of `batch.ranks` runs on some ranks "
    "only",
)
def ranks(subject: Subject) -> None:
    """Two ranks average to the whole; of a loss that declares `batch_coupled`, to the whole or to the mean of each
    rank's own, and every rank takes part in the same collectives.
    """
    loss = subject.build()
    data = subject.data(size=max(6, 2 * loss.minimum_batch))
    coupled, local = loss.batch_coupled, _normalised_locally(loss)
    count = data.size // 2
    # One micro-batch a rank where micro-batches cannot be put together.
    parts = [[list(range(count))], [list(range(count, data.size))]]
    if not coupled and not local:
        parts = [[[0], list(range(1, count))], [list(range(count, data.size - 1)), [data.size - 1]]]

    built = [subject.build(), subject.build()]  # not in their threads, which share a random generator

    def work(rank: Ranks) -> Tensor:
        own = built[rank.index]
        mine = parts[rank.index]
        contributions = [
            dataclasses.replace(data.take(part), ranks=rank).loss(
                own, data.denominators(ranks=2, micro_batches=len(mine), share=len(part) / data.size)
            )
            for part in mine
        ]
        return torch.stack(contributions).sum()

    total = torch.stack(on_ranks(2, work)).mean()
    if coupled or local:
        shared = data.denominators(ranks=2, share=count / data.size)
        own = torch.stack([data.take(part).loss(subject.build(), shared) for (part,) in parts]).mean()
        if (total - own).abs() <= 1e-9 + 1e-7 * own.abs():
            return
    _require_same(data, subject.build(), total, "averaged over two ranks")


@check(
    usual_cause="rewards, groups or states of this rank alone are used: `rollout.rewards` and `group_ids` hold those "
    "of "
    "all ranks, `rollout.gather` collects the rest, `rollout.local` is this rank's part",
)
def prepare_on_ranks(subject: Subject) -> str | None:
    """`prepare` returns the same on two ranks as on one."""
    loss = subject.build()
    if not loss.prepares:
        return "it has no `prepare`"
    data = subject.data(size=6, lengths=[5, 3, 4, 2, 4, 1])
    data = data.with_rows(ids=data.rows["ids"] * data.rows["mask"])  # what stands in the padding may differ
    with torch.no_grad():
        whole = loss.prepare(data.rollout(loss=loss))
    _require_same_rows(prepared_on_ranks(subject.build(), data, 2), whole, "prepared on two ranks", "on one")
    return None


def _require_same_rows(found: dict[str, Tensor], expected: dict[str, Tensor], how: str, versus: str) -> None:
    if found.keys() != expected.keys():
        fail(f"{sorted(found.keys() ^ expected.keys())} are prepared in one of two cases only: {how}, or {versus}")
    for name, value in expected.items():
        ours = found[name]
        if ours.dim() > 1 and ours.shape[2:] == value.shape[2:]:  # cut to another longest completion
            width = min(ours.size(1), value.size(1))
            ours, value = ours[:, :width], value[:, :width]
        require_equal(ours, value, f"'{name}' {how},", versus=f"{versus} it is")


@check(
    usual_cause="`batch.advantages` is (B, 1), or (B, T) where a trainer has advantages for each token: multiply "
    "with it as it is, without `squeeze` or `[:, 0]`",
)
def token_advantages(subject: Subject) -> str | None:
    """Advantages given for each token, (B, T), act as those given for each completion where they are equal."""
    data = subject.data()
    if data.family != "policy":
        return "there are no advantages in pairs"
    wide = data.items["advantages"].unsqueeze(1).expand_as(data.rows["mask"])
    total = dataclasses.replace(data, items=data.items | {"advantages": wide}).loss(subject.build())
    _require_same(data, subject.build(), total, "with advantages (B, T)", "with (B, 1) it is")
    return None


@check(
    usual_cause="state shared between objects, such as a class attribute or a module-level variable that `prepare` "
    "writes",
)
def composition(subject: Subject) -> None:
    """In a composition the loss contributes its weight times itself, also twice under two names."""
    data = subject.data()
    alone = subject.build()
    components = [("first", 0.75, subject.build()), ("second", -0.25, subject.build())]
    composed = LossFunctionRegistry.build({"type": "composed", "components": components})
    total = data.loss(composed)
    expected = data.loss(alone)
    require_equal(total, 0.5 * expected, "0.75 times the loss minus 0.25 times the loss", versus="half of it is")
    for name, gradient in data.gradients(alone, expected).items():
        found = data.gradients(composed, total)[name]
        require_equal(found, 0.5 * gradient, f"the gradient (rows '{name}') in a composition", versus="half of it is")
