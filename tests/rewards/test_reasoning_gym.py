"""The reward from reasoning-gym: right, wrong and unreadable answers, several tasks in a batch, mistakes."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.rewards import reasoning_gym_reward
from trl_custom_losses.rewards.reasoning_gym import _RUN_THE_ANSWER, candidate_answers, load_scorer
from trl_custom_losses.trainers.launch import load_reward

MODULE = importlib.import_module("trl_custom_losses.rewards.reasoning_gym")

SUM = json.dumps({"question": "3 + 4 =", "answer": "7", "metadata": {}})
WORD = json.dumps({"question": "Spell backward: sun", "answer": "nus", "metadata": {"word": "sun"}})


@pytest.fixture
def library():
    """The package; each test begins without scorers that another one made."""
    MODULE._scorer.cache_clear()
    yield pytest.importorskip("reasoning_gym")
    MODULE._scorer.cache_clear()


def score(*completions, task="chain_sum", entry=SUM):
    n = len(completions)
    return reasoning_gym_reward(list(completions), task=[task] * n, entry=[entry] * n, prompts=["?"] * n)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no <answer>3</answer> but <answer> 7 </answer>.", ["7"]),
        ("<answer>7", ["7"]),
        ("Answer: 3\nAnswer: 7 ", ["7"]),
        ("<answer>7</answer>\nAnswer: 3", ["7"]),
        ("First 3 + 4.\nThe answer is 7.\n", ["The answer is 7.", "7"]),
        ("7", ["7"]),
        ("<answer></answer> 7", [""]),
        (" \n", []),
    ],
)
def test_the_answer_is_found_in_a_completion(text, expected):
    assert candidate_answers(text) == expected


def test_right_wrong_and_unreadable_answers(library):
    right = ["7", "<answer>7</answer>", "3 + 4 = 7", "It is 7.", "Answer: 7.0"]
    assert score(*right) == [1.0] * len(right)
    assert score("8", "", "\n", "seven", "<answer></answer> 7", "Answer: none") == [0.0] * 6


def test_a_completion_cannot_list_guesses(library):
    [listed] = score("5 6 7 8")
    assert 0 < listed < 0.2  # reasoning-gym's own credit for an answer that contains the right one


def test_conversational_completions(library):
    chats = [
        [{"role": "assistant", "content": "7"}],
        [{"role": "assistant", "content": "7"}, {"role": "assistant", "content": "8"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "Answer: 7"}]}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert score(*chats) == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_a_batch_mixes_tasks_and_makes_each_scorer_once(library, monkeypatch):
    made = []
    create = library.create_dataset
    monkeypatch.setattr(library, "create_dataset", lambda task, **options: made.append(task) or create(task, **options))
    rewards = reasoning_gym_reward(
        ["7", "nus", "nus", "7"],
        task=["chain_sum", "spell_backward", "chain_sum", "spell_backward"],
        entry=[SUM, WORD, SUM, WORD],
    )
    assert rewards == [1.0, 1.0, 0.0, 0.0]
    assert made == ["chain_sum", "spell_backward"]


def test_the_options_of_a_task_reach_its_scorer(library):
    assert load_scorer("chain_sum", '{"max_terms": 3}').config.max_terms == 3
    assert load_scorer("chain_sum").config.max_terms == library.create_dataset("chain_sum").config.max_terms != 3
    with pytest.raises(LossConfigError, match=r"refuses the task 'chain_sum'.*max_trems"):
        reasoning_gym_reward(["7"], ["chain_sum"], [SUM], ['{"max_trems": 3}'])


@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "gcd", "time_intervals", "polynomial_equations"])
def test_generated_answers_score_one_after_a_way_through_json(library, task):
    entries = list(library.create_dataset(task, size=4, seed=1))
    completions = [f"<answer>{entry['answer']}</answer>" for entry in entries]
    assert reasoning_gym_reward(completions, [task] * 4, [json.dumps(entry) for entry in entries]) == [1.0] * 4


def test_a_scorer_that_stumbles_over_an_answer_calls_it_wrong(library, monkeypatch):
    def strict(answer, entry):
        return float(int(answer) == int(entry["answer"]))

    monkeypatch.setattr(load_scorer("chain_sum"), "score_answer", strict)
    assert score("many", "7") == [0.0, 1.0]
    with pytest.raises(ValueError, match="'VII'"):  # here it is the entry that is wrong
        score("7", entry='{"answer": "VII"}')


@pytest.mark.parametrize("task", sorted(_RUN_THE_ANSWER))
def test_scorers_that_run_the_answer_are_refused(task):
    with pytest.raises(LossConfigError, match=f"'{task}'.*runs the answer as Python"):
        score("__import__('os').getcwd()", task=task)


def test_the_refused_tasks_are_those_of_the_package(library):
    """Whose `score_answer` calls eval, exec or a parser of SymPy, in the installed version."""
    import inspect

    from reasoning_gym.factory import DATASETS

    calls = ("eval(", "exec(", "parse_expr(", "sympify(")
    sources = {
        name: inspect.getsource(data.score_answer).replace('eval(entry["answer"])', "")
        for name, (data, _) in DATASETS.items()
    }
    own_parser = {"propositional_logic"}  # a function of its own with the same name
    found = {name for name, source in sources.items() if any(call in source for call in calls)}
    assert found - own_parser == set(_RUN_THE_ANSWER)


def test_missing_columns_are_named():
    with pytest.raises(LossConfigError, match="missing: task, entry"):
        reasoning_gym_reward(["7"])
    with pytest.raises(LossConfigError, match=r"missing: entry\."):
        reasoning_gym_reward(["7"], task=["chain_sum"])


@pytest.mark.parametrize("entry", ["not json", "[1]", None])
def test_an_entry_that_is_no_json_object_is_an_error(library, entry):
    with pytest.raises(LossConfigError, match="column `entry` must hold JSON objects"):
        score("7", entry=entry)
    with pytest.raises(LossConfigError, match="with an answer"):
        score("7", entry='{"question": "3 + 4 ="}')


def test_an_unknown_task_is_an_error(library):
    with pytest.raises(LossConfigError, match="'chain_smu'"):
        score("7", task="chain_smu")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    MODULE._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as Python marks what cannot be imported
    with pytest.raises(LossConfigError, match=r"pip install 'trl-custom-losses\[reasoning\]'"):
        score("7")


def test_recipes_find_it_by_its_path():
    assert load_reward("trl_custom_losses.rewards:reasoning_gym_reward") is reasoning_gym_reward
