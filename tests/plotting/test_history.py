"""What a run logged, read back."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from trl_custom_losses import LossConfigError

pytest.importorskip("matplotlib")

from trl_custom_losses.plotting.history import History, read_state

from .runs import composed_log, write_state


def test_entries_of_different_keys_become_series() -> None:
    history = History.from_log(composed_log(4))
    assert history.train["pref_loss"].steps.tolist() == [1, 2, 3, 4]
    assert history.train["pref_loss"].values.tolist() == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert history.evaluations[""]["loss"].steps.tolist() == [2, 4]
    assert history.evaluations[""]["loss"].values.tolist() == [5.0, 7.0]
    assert history.once == {"train_runtime": 75.0, "train_loss": 0.5, "total_flos": 1.0}
    assert not {"step", "epoch", "train_loss", "eval_loss", "eval_runtime", "runtime"} & set(history.train)
    assert set(history.evaluations[""]) == {"loss"}
    assert history.last_step == 4


def test_what_is_not_finite_is_a_gap_and_is_counted() -> None:
    entries = [{"step": step, "loss": loss} for step, loss in enumerate([1.0, math.nan, 3.0, math.inf, -math.inf])]
    history = History.from_log(entries)
    np.testing.assert_array_equal(history.train["loss"].values, [1.0, math.nan, 3.0, math.nan, math.nan])
    assert history.not_finite == {"loss": 3}
    assert history.train["loss"].last == 3.0
    assert not History.from_log([{"step": 1, "loss": math.nan}]).train["loss"].drawable


def test_what_is_no_number_or_has_no_step_is_left_out() -> None:
    entries = [
        {"step": 1, "a": "text", "b": True, "c": None, "d": [1], "e": 2},
        {"loss": 1.0},
        "no entry",
        {"step": None},
    ]
    history = History.from_log(entries)
    assert set(history.train) == {"e"}


def test_steps_are_sorted_and_the_last_value_of_a_step_counts() -> None:
    history = History.from_log([{"step": 3, "x": 1.0}, {"step": 1, "x": 2.0}, {"step": 3, "x": 5.0}])
    assert history.train["x"].steps.tolist() == [1, 3]
    assert history.train["x"].values.tolist() == [2.0, 5.0]
    np.testing.assert_array_equal(history.train["x"].at(np.array([1, 2, 3])), [2.0, math.nan, 5.0])


def test_evaluations_of_several_data_sets_are_kept_apart() -> None:
    entries = [
        {"step": 1, "loss": 1.0, "sft_loss": 1.0, "rewards/margins": 0.5},
        {"step": 1, "eval_easy_loss": 2.0, "eval_easy_rewards/margins": 3.0, "eval_easy_runtime": 1.0},
        {"step": 1, "eval_hard_one_loss": 4.0, "eval_hard_one_sft_loss": 5.0},
    ]
    evaluations = History.from_log(entries).evaluations
    assert {name: {key: s.last for key, s in found.items()} for name, found in evaluations.items()} == {
        "easy": {"loss": 2.0, "rewards/margins": 3.0},
        "hard_one": {"loss": 4.0, "sft_loss": 5.0},
    }


def test_what_would_overflow_counts_as_not_finite() -> None:
    entries = [{"step": step, "x": x} for step, x in enumerate([1e100, 1.1e100, -1e308, 10**400])]
    history = History.from_log([*entries, {"step": 1e300, "y": 1.0}])
    np.testing.assert_array_equal(history.train["x"].values, [1e100, math.nan, math.nan, math.nan])
    assert history.not_finite == {"x": 3} and set(history.train) == {"x"}


# Where the log is


def test_the_newest_checkpoint_by_number_is_read(tmp_path: Path) -> None:
    for number in (9, 10, 2):
        write_state(tmp_path / f"checkpoint-{number}", [{"step": number, "loss": 1.0}])
    (tmp_path / "checkpoint-11").mkdir()  # half-written
    state, path = read_state(tmp_path)
    assert path == tmp_path / "checkpoint-10" / "trainer_state.json"
    assert state["global_step"] == 10


@pytest.mark.parametrize(("own", "expected"), [(12, "trainer_state.json"), (4, "checkpoint-10/trainer_state.json")])
def test_the_folders_own_log_counts_if_it_goes_further(tmp_path: Path, own: int, expected: str) -> None:
    write_state(tmp_path / "checkpoint-10", [{"step": 10, "loss": 1.0}])
    write_state(tmp_path, [{"step": own, "loss": 1.0}])
    assert read_state(tmp_path)[1] == tmp_path / expected


def test_a_finished_run_has_more_to_say_than_its_last_checkpoint(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-10", [{"step": 10, "loss": 1.0}])
    write_state(tmp_path, [{"step": 10, "loss": 1.0}, {"step": 10, "train_runtime": 3.0}])
    assert read_state(tmp_path)[1] == tmp_path / "trainer_state.json"


def test_a_run_that_saved_nothing_is_read_from_its_report(tmp_path: Path) -> None:
    write_state(tmp_path / "report", [{"step": 3, "loss": 1.0}])
    assert read_state(tmp_path)[1] == tmp_path / "report" / "trainer_state.json"


def test_nothing_to_read_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(LossConfigError, match=r"looked for checkpoint-\*/trainer_state.json.*RunReportCallback"):
        read_state(tmp_path)
    with pytest.raises(LossConfigError, match=r"found nothing: .*absent"):
        read_state(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(LossConfigError, match="found a file"):
        read_state(tmp_path / "file")


@pytest.mark.parametrize("damaged", ["checkpoint-30", "checkpoint-20", "", "report"])
def test_a_damaged_log_does_not_hide_a_good_one(tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture) -> None:
    write_state(tmp_path / "checkpoint-10", [{"step": 10, "loss": 1.0}])
    (tmp_path / damaged).mkdir(exist_ok=True)
    (tmp_path / damaged / "trainer_state.json").write_text('{"log_h')
    with caplog.at_level(logging.WARNING):
        state, path = read_state(tmp_path)
    assert path == tmp_path / "checkpoint-10" / "trainer_state.json" and state["global_step"] == 10
    (record,) = caplog.records
    assert f"{tmp_path / damaged / 'trainer_state.json'} cannot be read as JSON" in record.getMessage()


def test_all_damaged_logs_are_named(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{")
    with pytest.raises(LossConfigError, match=r"checkpoint-20/trainer_state\.json.*; .*checkpoint-10/trainer_state"):
        read_state(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", '{"log_history": 1}', "[]", '"text"', "{}", "\udcff"])
def test_a_damaged_log_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "trainer_state.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(LossConfigError, match=r"trainer_state\.json"):
        read_state(tmp_path)


def test_nan_in_the_file_is_read(tmp_path: Path) -> None:
    write_state(tmp_path, [{"step": 1, "loss": math.nan}])
    assert "NaN" in (tmp_path / "trainer_state.json").read_text()
    state, _ = read_state(tmp_path)
    assert History.from_log(state["log_history"]).not_finite == {"loss": 1}
    assert json.dumps(state["global_step"]) == "1"
