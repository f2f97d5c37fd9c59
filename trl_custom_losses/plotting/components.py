"""Which logged metrics are the components of a composition, and of which one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .history import Series

_LOSS, _WEIGHT, _TOTAL = "_loss", "_weight", "total_loss"
#: A sum that misses the total by more than the first is not of these components alone, if a part of them misses it by
#: less than the second; relative to the total's largest value.
_FAR, _NEAR = 0.1, 0.01
#: More components than this are not tried in all combinations to find out which of them belong together.
_MOST_TRIED = 14


@dataclass(frozen=True, eq=False)
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

    @property
    def finite(self) -> bool:
        """Whether there is any value and any weight that is finite."""
        return self.loss.drawable and self.weight.drawable

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
    def never_finite(self) -> tuple[Component, ...]:
        """Components of which no value or no weight is finite."""
        return tuple(part for part in self.components if not part.finite)

    @property
    def steps(self) -> np.ndarray:
        """Steps at which any component was logged."""
        return np.unique(np.concatenate([component.loss.steps for component in self.components]))

    def weighted(self) -> np.ndarray:
        """Loss times weight of each component, (components, steps)."""
        return np.stack([component.weighted(self.steps) for component in self.components])

    def missing_share(self) -> float:
        """How far the components' sum is from the logged total, at most, relative to the total's largest value."""
        return 0.0 if self.total is None else _error(self.weighted().sum(0), self.total.at(self.steps))


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
        if key + _WEIGHT in series
    ]
    groups = []
    for key in sorted(totals, key=lambda key: (key.count("/"), key)):
        name = key.removesuffix(_TOTAL).removesuffix("/")
        # A component whose name in the log says which composition it is in belongs nowhere else.
        allowed = ("", key.removesuffix(_TOTAL))
        candidates = [part for part in free if part.key != name and _home(part.key, homes) in allowed]
        chosen = _closest(candidates, series[key], alone=len(totals) == 1)
        if chosen:
            groups.append(Group(name, tuple(chosen), series[key]))
            free = [part for part in free if part not in chosen]
    if free and not totals:
        groups.append(Group("", tuple(free), None))
    return groups


def _home(key: str, homes: Sequence[str]) -> str:
    """The composition that a component's name begins with, "outer/"; empty if it begins with none."""
    return max((home for home in homes if key.startswith(home)), key=len, default="")


def _closest(candidates: Sequence[Component], total: Series, *, alone: bool) -> list[Component]:
    """The fewest candidates whose weighted sum is closest to the total, and those that were never finite.

    Args:
        candidates: That may belong to it.
        total: As logged.
        alone: Whether it is the only one. Then all belong to it, unless that is far off and a part of them fits.
    """
    finite = [part for part in candidates if part.finite]
    values = [part.weighted(total.steps) for part in finite]
    if not finite or len(finite) > _MOST_TRIED:
        return list(candidates)
    everything = _error(sum(values), total.values)
    if alone and everything <= _FAR:
        return list(candidates)
    best: tuple[float, list[int]] = (np.inf, [])
    for size in range(1, len(finite) + 1):
        for subset in combinations(range(len(finite)), size):
            error = _error(sum(values[i] for i in subset), total.values)
            if error < best[0] - 1e-6:  # a larger set must be better by more than rounding
                best = error, list(subset)
    if alone and best[0] > _NEAR:
        return list(candidates)
    chosen = [finite[i] for i in best[1]]
    return [part for part in candidates if part in chosen or not part.finite]


def _error(found: np.ndarray, total: np.ndarray) -> float:
    """Largest distance of two curves, over the total's largest value; 0 where they have no step in common."""
    known = np.isfinite(found) & np.isfinite(total)
    scale = max(float(np.abs(total[known]).max(initial=0.0)), 1e-12)
    return float(np.abs(found[known] - total[known]).max(initial=0.0)) / scale
