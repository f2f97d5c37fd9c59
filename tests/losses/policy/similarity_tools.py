"""Similarities as tests give and read them."""

from __future__ import annotations

from itertools import permutations

from torch import Tensor

from trl_custom_losses.losses.policy.similarity import Similarities


class GivenSimilarities(Similarities):
    """Similarities given as a matrix, (N, N)."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.size(0), matrix.device)
        self.matrix = matrix

    def units(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        return (self.matrix[rows][:, columns] * 1e5).round()

    def take(self, index: Tensor) -> GivenSimilarities:
        return GivenSimilarities(self.matrix[index][:, index])


def matrix(similarities: Similarities) -> Tensor:
    """All of them, (N, N), as cosines."""
    return similarities.units(slice(None), slice(None)) / 1e5


def groups_by_definition(cosines: list[list[float]], allowed: list[list[bool]], largest: int) -> list[int]:
    """Groups as `DynamicGRPOLoss` defines them, word by word, with everything computed anew for each."""
    free, groups, number = set(range(len(cosines))), [-1] * len(cosines), 0
    near: dict[int, set[int]] = {i: set() for i in free}
    for first, second in permutations(free, 2):
        if allowed[first][second]:
            near[first].add(second)
    while free:
        fellows = {i: near[i] & free for i in free}
        together = {i: sum(round(cosines[i][j] * 1e5) for j in fellows[i]) for i in free}
        leader = min(free, key=lambda i: (-len(fellows[i]), -together[i], i))
        most_similar = sorted(fellows[leader], key=lambda j: (-cosines[leader][j], j))
        for member in (leader, *most_similar[: largest - 1]):
            groups[member] = number
            free.remove(member)
        number += 1
    return groups
