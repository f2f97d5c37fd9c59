"""`show`: the card of each loss, and of a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trl_custom_losses import LossFunctionRegistry

from .running import run

KEYS = [
    "name",
    "family",
    "summary",
    "formula",
    "notes",
    "hyperparameters",
    "requires",
    "rollout_requires",
    "costs",
    "columns",
    "scored_columns",
    "limits",
    "errors",
    "source",
    "papers",
    "loss_function",
    "metrics",
]


@pytest.mark.parametrize("name", LossFunctionRegistry.names())
def test_every_loss_has_a_card_whose_config_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = run("show", name, "--json").json
    assert list(card) == KEYS
    assert card["summary"] and card["formula"] and card["source"]
    assert [hp["name"] for hp in card["hyperparameters"]] == list(
        LossFunctionRegistry.get(name).declared_hyperparameters()
    )
    assert set(card["costs"]) == set(card["requires"])
    monkeypatch.setenv("COLUMNS", "80")
    text = run("show", name).out
    block = yaml.safe_load(text.partition("In a config\n")[2])
    assert block == {"loss_function": card["loss_function"]}
    assert LossFunctionRegistry.build(block["loss_function"]).name == name
    for part in (*card["formula"], *card["metrics"], *card["requires"], *card["columns"]):
        assert part in text
    indented = [line for line in text.splitlines() if not any(line.strip() in row for row in card["formula"])]
    assert max(map(len, indented)) <= 80


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", []),
        ("consistency", ["consistency_neighbours"]),
        ("composed", ["sigmoid_loss", "sigmoid_weight", "sft_loss", "sft_weight", "total_loss"]),
        ("clipped_loss", ["base_loss", "grad_norm", "clip_fraction"]),
    ],
)
def test_the_metrics_are_what_the_loss_returns(name: str, expected: list[str]) -> None:
    assert run("show", name, "--json").json["metrics"] == expected


def test_the_metrics_of_a_policy_loss_are_found_too() -> None:
    assert "clip_ratio/low_mean" in run("show", "grpo", "--json").json["metrics"]
    text = run("show", "sigmoid").out
    assert "Logs, beside TRL's metrics\n  nothing\n" in text


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("aot", "depends on how a batch is split, and `use_weighting` is refused"),
        ("bnpo", "averages within each micro-batch"),
        ("consistency", "must hold at least 2 pairs"),
        ("apo_zero", "`f_divergence_type` must stay 'reverse_kl'"),
        ("sft", "`use_weighting` multiplies the value by the mean weight"),
        ("multi_objective_dpo", "`use_weighting` multiplies the value of 'perplexity' by the mean weight"),
        ("rollout_pairs", "a reference model also at `beta: 0`"),
        ("diversity", "vLLM's ratios do not act on it"),
        ("composed_dpo_grpo", "vLLM's ratios do not act on 'adaptive_dpo'"),
        ("vespo", "`vllm_importance_sampling_mode` must be 'token_truncate' or 'token_mask'"),
        ("cispo", "not the derivative of its value"),
    ],
)
def test_limits_follow_from_what_a_loss_declares(name: str, limit: str) -> None:
    limits = run("show", name, "--json").json["limits"]
    assert any(limit in text for text in limits), limits


def test_a_loss_without_limits_has_none() -> None:
    assert run("show", "sigmoid", "--json").json["limits"] == []
    assert "Limits" not in run("show", "sigmoid").out


def test_what_a_docstring_refuses_is_a_limit() -> None:
    assert "Refused: no component, two of the same name" in run("show", "composed").out


def test_logits_cost_memory_and_rule_out_nothing_else(workshop: Path) -> None:
    (workshop / "own.py").write_text(
        "from trl_custom_losses import PreferenceLoss\n"
        "class Logits(PreferenceLoss):\n"
        "    requires = frozenset({'logits', 'ref_per_token_logps'})\n"
        "    def forward(self, batch, model_outputs):\n"
        "        chosen = model_outputs.logits[: batch.num_pairs].logsumexp(-1)\n"
        "        return chosen - model_outputs.ref_per_token_logps[: batch.num_pairs], {}\n"
    )
    card = run("show", "own:Logits", "--json").json
    assert "vocabulary" in card["costs"]["logits"]
    assert any("`precompute_ref_log_probs` must stay off" in limit for limit in card["limits"])
    assert any("logits stay in memory" in limit for limit in card["limits"])
    assert "It has no docstring." in run("show", "own:Logits").out


def test_a_loss_without_an_example_is_shown_but_not_run(workshop: Path) -> None:
    (workshop / "own.py").write_text(
        "from trl_custom_losses import PreferenceBatch\n"
        "def needs(batch: PreferenceBatch, outputs, *, strength: float, extra=None):\n"
        '    """A loss.\n\n    Args:\n        strength: Of something, > 0.\n    """\n'
        "    raise RuntimeError('run')\n"
    )
    card = run("show", "own:needs", "--json").json
    assert card["metrics"] is None and card["loss_function"] is None
    assert card["hyperparameters"] == [
        {"name": "strength", "type": "float", "required": True, "default": None, "description": "Of something, > 0."},
        {"name": "extra", "type": "Any", "required": False, "default": None, "description": ""},
    ]
    text = run("show", "own:needs").out
    assert "strength: float, required\n      Of something, > 0." in text
    assert "no `example` of strength" in text and "In a config" not in text


def test_a_file_or_a_folder_is_no_loss(workshop: Path) -> None:
    (workshop / "two.py").write_text("def loss(batch, outputs):\n    return outputs.logps, {}\n")
    takes = "takes a name or 'module:loss', found"
    check = "`trl-custom-losses check two.py` names its losses"
    for words, message in (
        (["show", "two.py"], f"`show` {takes} 'two.py': {check}"),
        (["show", "two"], f"`show` {takes} 'two': {check}"),
        (["show", "nowhere.py"], f"`show` {takes} 'nowhere.py'"),
        (["show", "."], f"`show` {takes} the folder ."),
    ):
        assert run(*words).err == f"error: {message}\n"


def test_an_unknown_name_is_one_line_with_the_nearest() -> None:
    done = run("show", "sigmod")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: there is no loss named 'sigmod' (did you mean 'sigmoid'")
    assert done.err.count("\n") == 1
