"""A loss that is not finite on one rank stops all ranks before any model moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .launching import launch
from .nonfinite_worker import BAD_RANK

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def folder(request, tmp_path_factory, dense_model) -> Path:
    """Where both ranks of a run wrote how they ended."""
    folder = tmp_path_factory.mktemp(request.param)
    launch(request.param, "tests.trainers.nonfinite_worker", dense_model, folder, folder=folder)
    return folder


def test_all_ranks_stop_at_the_same_step_and_no_model_moves(folder: Path) -> None:
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert all("not finite at step 2" in rank["message"] for rank in found)
    assert [rank["steps"] for rank in found] == [1, 1]
    assert all(rank["finite"] for rank in found)
    causes = [rank["message"].split("Not finite: ")[1].split(".")[0] for rank in found]
    assert causes[BAD_RANK] == "loss"
    assert causes[1 - BAD_RANK] == "the loss of another rank"
    assert [path.name for path in (folder / "run").glob("checkpoint-*")] == ["checkpoint-1"]
