"""`list`: which losses it shows, and that it can be read."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from trl_custom_losses import LossFunctionRegistry

from .running import ROOT, run

KEYS = ["name", "family", "summary", "requires", "rollout_requires", "columns", "papers", "source"]


def names(*words: str) -> list[str]:
    done = run("list", "--json", *words)
    assert done.code == 0 and done.err == ""
    return [loss["name"] for loss in done.json]


def test_the_json_has_every_loss_and_a_stable_schema() -> None:
    losses = run("list", "--json").json
    assert [loss["name"] for loss in losses] == LossFunctionRegistry.names()
    assert all(list(loss) == KEYS for loss in losses)
    sigmoid = next(loss for loss in losses if loss["name"] == "sigmoid")
    assert sigmoid == {
        "name": "sigmoid",
        "family": "preference",
        "summary": "DPO: logistic loss on the implicit reward margin.",
        "requires": ["ref_logps"],
        "rollout_requires": [],
        "columns": [],
        "papers": ["2305.18290"],
        "source": "Rafailov et al. 2023, arXiv:2305.18290.",
    }


@pytest.mark.parametrize("family", ["preference", "policy"])
def test_a_family_is_what_its_trainer_takes(family: str) -> None:
    assert names("--family", family) == LossFunctionRegistry.names(family)
    assert "composed" in names("--family", family)


def test_needs_are_those_of_the_built_loss() -> None:
    assert "ref_logps" not in LossFunctionRegistry.get("adaptive_dpo").requires  # it takes them from its base
    assert "adaptive_dpo" in names("--needs", "ref_logps")
    assert names("--needs", "sequence_hidden") == ["consistency"]
    assert names("--needs", "logits") == []


def test_filters_combine() -> None:
    assert names("--needs", "pooled_hidden", "--columns") == ["multi_objective_grpo", "quality"]
    assert names("--needs", "pooled_hidden", "--needs", "old_per_token_logps") == ["multi_objective_grpo"]
    assert names("--columns", "--family", "preference", "--needs", "ref_logps") == [
        "bfpo",
        "multi_objective_dpo",
        "safe_dpo",
    ]
    assert names("--columns", "--family", "policy") == ["multi_objective_grpo", "quality"]


def test_a_composition_of_either_family_has_no_needs_of_its_own() -> None:
    assert "composed" not in names("--needs", "ref_logps")
    assert "what its parts need" in next(line for line in run("list").out.splitlines() if line.startswith("composed "))


def test_an_unknown_need_is_a_usage_error_that_lists_the_known_ones() -> None:
    done = run("list", "--needs", "logit")
    assert done.code == 2 and done.out == ""
    assert "no trainer computes 'logit'" in done.err
    for field in ("logits", "rewards", "ref_per_token_logps"):
        assert field in done.err


def test_nothing_found_is_said() -> None:
    assert run("list", "--needs", "second_logits").out == "No registered loss is like that.\n"


def test_in_a_pipe_a_loss_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    done = run("list")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["loss", *LossFunctionRegistry.names()]
    assert "\x1b" not in done.out and done.err == ""
    row = next(line for line in lines if line.startswith("safe_dpo"))
    assert row.split()[:3] == ["safe_dpo", "preference", "2505.20065"]
    assert "ref_logps, column chosen_unsafe, column rejected_unsafe  SafeDPO: DPO on pairs reordered" in row


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_the_terminal_without_cutting_a_word(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = run("list").out
    assert max(map(len, text.splitlines())) <= columns
    words = set(text.split())
    assert set(LossFunctionRegistry.names()) <= words
    for loss in run("list", "--json").json:
        assert set(loss["summary"].split()) <= words


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_gets_a_bold_header_and_a_hint(plain: bool, tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", **({"NO_COLOR": "1"} if plain else {})}
    command = [sys.executable, "-m", "trl_custom_losses", "list", "--columns"]
    with subprocess.Popen(command, stdout=writer, cwd=tmp_path, env=environment) as process:
        os.close(writer)
        text = b""
        while part := _read(reader):
            text += part
    os.close(reader)
    assert process.returncode == 0
    assert (b"\x1b[1m" in text) == (not plain)
    assert b"trl-custom-losses show NAME" in text


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""
