"""Dynamic grouping of large generation batches: time, memory and growth, against a matrix of all pairs.

The figures are those of `scope="batch"`, in which any two responses are compared.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_custom_losses.losses.policy.dynamic_grpo import form_groups
from trl_custom_losses.losses.policy.similarity import VectorSimilarities

from .measure import peak_memory

_SIZES = {256: 9, 1024: 5, 4096: 3, 16384: 1}  # responses -> repeats
_QUICK_SIZES = {64: 3, 256: 3}
_LARGEST_MATRIX = 4096
_DIMENSIONS = 1024
_THRESHOLD, _LARGEST = 0.8, 10  # the loss's defaults

_RESPONSES, _TOKENS = 4096, 256
_ASSUMED_TOKENS_PER_SECOND = 20_000.0


def vectors(size: int, clusters: int, dimensions: int = _DIMENSIONS, noise: float = 0.45, seed: int = 0) -> Tensor:
    """Vectors around centres: each entry of a centre and of the noise is normal, a vector's centre drawn at random.

    Two vectors around one centre have a cosine of about 1 / (1 + noise^2), 0.83 by default, two others of about 0.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dimensions, generator=generator)
    chosen = torch.randint(clusters, (size,), generator=generator)
    return centres[chosen] + noise * torch.randn(size, dimensions, generator=generator)


def matrix_of_cosines(found: Tensor) -> Tensor:
    """Cosines of all pairs, (N, N), rounded to 5 decimals; 0 with a vector of zeros."""
    found = F.normalize(found.double(), dim=1, eps=1e-300)
    return ((found @ found.T).clamp(-1, 1) * 1e5).round() / 1e5


def groups_from_matrix(cosines: Tensor, allowed: Tensor, largest: int) -> Tensor:
    """Groups by the definition in `DynamicGRPOLoss`, one after the other, on whole matrices.

    Args:
        cosines: (N, N), rounded to 5 decimals.
        allowed: Whether two responses are similar enough for one group, (N, N).
        largest: Most responses in a group.

    Returns:
        Group numbers from 0 in the order of formation, (N,).
    """
    size = cosines.size(0)
    links = (allowed & ~torch.eye(size, dtype=torch.bool)).long()
    hundred_thousandths = (cosines * 1e5).round().long() * links
    number_of_links, sum_of_links = links.sum(1), hundred_thousandths.sum(1)
    groups = torch.full((size,), -1)
    for number in range(size):
        candidates = torch.where(groups < 0)[0]
        if candidates.numel() == 0:
            break
        for measure in (number_of_links, sum_of_links):  # the second decides among those that are first by the first
            candidates = candidates[measure[candidates] == measure[candidates].max()]
        leader = candidates[:1]
        fellows = torch.where((links[leader[0]] > 0) & (groups < 0))[0]
        by_similarity = hundred_thousandths[leader[0], fellows].sort(descending=True, stable=True).indices
        members = torch.cat((leader, fellows[by_similarity[: largest - 1]]))
        groups[members] = number
        number_of_links -= links[members].sum(0)
        sum_of_links -= hundred_thousandths[members].sum(0)
    return groups


def generation_seconds(tokens_per_second: float, responses: int = _RESPONSES, tokens: int = _TOKENS) -> float:
    """How long a generation step takes: responses x tokens per response / tokens per second."""
    return responses * tokens / tokens_per_second


def tokens_per_second(quick: bool = False) -> dict[str, float]:
    """New tokens per second of a Qwen2 model of 0.5B random parameters on this CPU, by type and batch size.

    Of steps after the prompt's, with a cache of some 20 tokens: longer ones are slower, so that the figure is high.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    if not quick:
        width = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
    config = Qwen2Config(**width, num_attention_heads=14 if not quick else 4, num_key_value_heads=2)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    found = {}
    model = Qwen2ForCausalLM(config).eval()
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model.to(dtype)
        for batch in (16, 64):
            prompts = torch.randint(3, config.vocab_size, (batch, 16))
            one, several = (_seconds_of_generation(model, prompts, tokens) for tokens in (1, 7))
            found[f"{name}, batch of {batch}"] = batch * 6 / (several - one)
    return found


def _seconds_of_generation(model: Any, prompts: Tensor, tokens: int) -> float:
    start = time.perf_counter()
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": True, "pad_token_id": 0}
    model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    return time.perf_counter() - start


def run(quick: bool = False) -> dict[str, Any]:
    """Measure the case.

    Args:
        quick: Two small batches and a tiny model alone.

    Returns:
        What `table` shows, with the assumptions.
    """
    sizes = _QUICK_SIZES if quick else _SIZES
    clustered = [_measured(size, max(1, size // 8), repeats) for size, repeats in sizes.items()]
    alike = [_measured(size, 1, min(3, repeats)) for size, repeats in sizes.items() if size <= _LARGEST_MATRIX]
    speeds = tokens_per_second(quick)
    name, speed = max(speeds.items(), key=lambda item: item[1])
    groupings = {kind: _seconds_of_grouping(rows) for kind, rows in (("clustered", clustered), ("all alike", alike))}
    return {
        "threads": torch.get_num_threads(),
        "dimensions": _DIMENSIONS,
        "similarity_threshold": _THRESHOLD,
        "max_group_size": _LARGEST,
        "vectors": "normal around size / 8 normal centres, noise 0.45; 'all alike': around one",
        "clustered": clustered,
        "all alike": alike,
        "growth": {"clustered": _growth(clustered), "all alike": _growth(alike)},
        "generation": {
            "responses": _RESPONSES,
            "tokens per response (assumed)": _TOKENS,
            "grouping seconds": groupings,
            "measured tokens per second": speeds,
            "measured model": "tiny, 2 layers"
            if quick
            else "Qwen2, 24 layers of 896, 0.5B random parameters, this CPU",
            "fastest": name,
            "seconds at the fastest": generation_seconds(speed),
            "grouping / generation, percent": _percent(groupings, speed),
            "assumed tokens per second": _ASSUMED_TOKENS_PER_SECOND,
            "assumption": "a model of 0.5B parameters served on one GPU, grouping on this CPU",
            "seconds as assumed": generation_seconds(_ASSUMED_TOKENS_PER_SECOND),
            "grouping / generation as assumed, percent": _percent(groupings, _ASSUMED_TOKENS_PER_SECOND),
        },
    }


def _seconds_of_grouping(rows: list[dict[str, Any]]) -> float:
    """Of the batch that generation is estimated for; a quick run has none so large, and time is at most quadratic."""
    last = next(row for row in reversed(rows) if row["responses"] <= _RESPONSES)
    return last["ours"]["seconds"] * (_RESPONSES / last["responses"]) ** 2


def _percent(groupings: dict[str, float], speed: float) -> dict[str, float]:
    return {kind: 100 * seconds / generation_seconds(speed) for kind, seconds in groupings.items()}


def table(result: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of what `run` returned, the first of them its head."""
    share = result["generation"]["grouping / generation, percent"]
    rows = [
        [
            "responses",
            "vectors",
            "groups",
            "seconds",
            "MB",
            "seconds with a matrix",
            "MB with a matrix",
            "% of generation",
        ]
    ]
    for kind in ("clustered", "all alike"):
        for row in result[kind]:
            cells = [str(row["responses"]), kind, str(row["groups"]), *_cells(row["ours"])]
            percent = f"{share[kind]:.2g}" if row["responses"] == _RESPONSES else ""
            rows.append([*cells, *(_cells(row["matrix"]) if row["matrix"] else ("", "")), percent])
    return rows


def _cells(figures: dict[str, float]) -> tuple[str, str]:
    return f"{figures['seconds']:.3g}", f"{figures['megabytes']:.1f}"


def _measured(size: int, clusters: int, repeats: int) -> dict[str, Any]:
    found = vectors(size, clusters)

    def ours() -> Tensor:
        return form_groups(VectorSimilarities(found), _THRESHOLD, _LARGEST)

    def matrix() -> Tensor:
        cosines = matrix_of_cosines(found)
        return groups_from_matrix(cosines, cosines >= _THRESHOLD, _LARGEST)

    groups = ours()
    row = {"responses": size, "groups": int(groups.max()) + 1, "ours": _cost(ours, repeats), "matrix": None}
    if size <= _LARGEST_MATRIX:
        similarities = VectorSimilarities(found).units(slice(None), slice(None)) / 1e5
        if not torch.equal(groups, groups_from_matrix(similarities, similarities >= _THRESHOLD, _LARGEST)):
            raise RuntimeError(f"{size} responses: not the groups of the sequential definition")
        row["matrix"] = _cost(matrix, repeats)
    return row


def _cost(call: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Median seconds and most megabytes allocated at once beyond the vectors."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "repeats": repeats, "megabytes": peak_memory(call) / 1e6}


def _growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents p of n^p from one size to the next."""
    found = []
    for small, large in pairwise(rows):
        factor = math.log(large["responses"] / small["responses"])
        of = {key: math.log(large["ours"][key] / small["ours"][key]) / factor for key in ("seconds", "megabytes")}
        found.append({"from": small["responses"], "to": large["responses"], "exponents": of})
    return found
