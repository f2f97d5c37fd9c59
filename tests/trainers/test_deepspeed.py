"""Losses with state under DeepSpeed: two real processes on CPUs."""

from __future__ import annotations

import json

import pytest

from .launching import launch

pytest.importorskip("deepspeed")

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", [2, 3])
def test_state_is_saved_and_continues_under_zero(stage, tmp_path, dense_model):
    launch(f"zero{stage}", "tests.trainers.deepspeed_worker", dense_model, tmp_path, folder=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["whole"] == first["resumed"] and len(first["whole"]["logs"]) == 2
    assert first["whole"]["state"] == second["whole"]["state"]
    weights = [entry["pref_weight"] for entry in first["whole"]["logs"]]
    assert weights[0] != weights[1]
    assert "learns rule.log_variances" in first["refused"] and "DEEPSPEED" in first["refused"]
    assert first["norms"] == second["norms"] and len(first["norms"]) == 2 and min(first["norms"]) > 0
    assert "whole gradients of the model's parameters on every process, found DEEPSPEED" in first["hidden"]
