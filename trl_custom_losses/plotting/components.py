"""Which logged metrics are the components of a composition, and of which one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .history import Series

_LOSS, _WEIGHT, _TOTAL = "_loss", "_weight", "total_loss"
#: More components than this are not tried in all combinations to find out which of them belong together.
_MOST_TRIED = 14


@dataclass(frozen=True)
class Component:
    """One component of a composition.

    Args:
        key: Its name in the log, "outer/inner" where the log says so.
        loss: Its value before the weight.
        weight: Its weight, with the factor of balancing.
        name: Its own name, without the composition that it is in.
    """

    key: str
    loss: Series
    weight: Series
    name: str

    def weighted(self, steps: np.ndarray) -> np.ndarray:
        """Loss times weight at `steps`, NaN where one of them is missing."""
        return self.loss.at(steps) * self.weight.at(steps)


@dataclass(frozen=True)
class Group:
    """The components of one composition.

    Args:
        name: Of the composition, as a component of another; empty for the whole loss.
        components: By which it is made up, in the order of their names.
        total: Their weighted sum as logged, if it was.
    """

    name: str
    components: tuple[Component, ...]
    total: Series | None

    @property
    def steps(self) -> np.ndarray:
        """Steps at which any component was logged."""
        return np.unique(np.concatenate([component.loss.steps for component in self.components]))

    def weighted(self) -> np.ndarray:
        """Loss times weight of each component, (components, steps)."""
        return np.stack([component.weighted(self.steps) for component in self.components])

    def missing_share(self) -> float:
        """How far the components' sum is from the logged total, at most, relative to the total's largest value."""
        if self.total is None:
            return 0.0
        total = self.total.at(self.steps)
        difference = np.abs(self.weighted().sum(0) - total)
        known = np.isfinite(difference)
        return float(difference[known].max() / max(np.abs(total[known]).max(), 1e-12)) if known.any() else 0.0


def groups_of(series: Mapping[str, Series]) -> list[Group]:
    """The compositions in a log: the whole loss first, then those within it.

    A name that occurs once is logged without the composition that it is in. So where a log has several totals, the
    components of each are those whose weighted sum is closest to it.
    """
    keys = [key.removesuffix(_LOSS) for key in series if key.endswith(_LOSS) and key != _TOTAL]
    totals = [key for key in series if key == _TOTAL or key.endswith(f"/{_TOTAL}")]
    homes = [key.removesuffix(_TOTAL) for key in totals]
    free = [
        Component(key, series[key + _LOSS], series[key + _WEIGHT], key.removeprefix(_home(key, homes)))
        for key in sorted(keys)
        if key + _WEIGHT in series and series[key + _LOSS].drawable and series[key + _WEIGHT].drawable
    ]
    groups = []
    for key in sorted(totals, key=lambda key: (key.count("/"), key)):
        name = key.removesuffix(_TOTAL).removesuffix("/")
        # A component whose name in the log says which composition it is in belongs nowhere else.
        allowed = ("", key.removesuffix(_TOTAL))
        candidates = [part for part in free if part.key != name and _home(part.key, homes) in allowed]
        # Where there is one total only, there is nothing to tell apart.
        chosen = candidates if len(totals) == 1 else _closest(candidates, series[key])
        if chosen:
            groups.append(Group(name, tuple(chosen), series[key]))
            free = [part for part in free if part not in chosen]
    if free and not totals:
        groups.append(Group("", tuple(free), None))
    return groups


def _home(key: str, homes: Sequence[str]) -> str:
    """The composition that a component's name begins with, "outer/"; empty if it begins with none."""
    return max((home for home in homes if key.startswith(home)), key=len, default="")


def _closest(candidates: Sequence[Component], total: Series) -> list[Component]:
    """The fewest candidates whose weighted sum is closest to the total."""
    if len(candidates) > _MOST_TRIED:
        return list(candidates)
    values = [np.nan_to_num(part.weighted(total.steps)) for part in candidates]
    wanted = np.nan_to_num(total.values)
    scale = max(float(np.abs(wanted).max()), 1e-12)
    best: tuple[float, list[int]] = (np.inf, [])
    for size in range(1, len(candidates) + 1):
        for subset in combinations(range(len(candidates)), size):
            error = float(np.abs(sum(values[i] for i in subset) - wanted).max()) / scale
            if error < best[0] - 1e-6:  # a larger set must be better by more than rounding
                best = error, list(subset)
    return [candidates[i] for i in best[1]]
