"""Verifiable rewards from the tasks of reasoning-gym, each of which brings its own scorer.

TRL's `trl.rewards` cannot serve: its accuracy rewards compare mathematics with one gold solution, while a task here may
have many right answers, or answers that are words, lists or boards, and gives part of the score for coming close.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from ..errors import LossConfigError

#: Tasks whose scorers run the answer as Python, by `eval` or by SymPy's parser, in reasoning-gym 0.1.25.
_RUN_THE_ANSWER = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)


def reasoning_gym_reward(
    completions: Sequence[str] | Sequence[Sequence[dict[str, Any]]],
    task: Sequence[str] | None = None,
    entry: Sequence[str] | None = None,
    task_options: Sequence[str] | None = None,
    **kwargs: Any,
) -> list[float]:
    """Score completions with reasoning-gym.

        reward = max over candidates of score_answer(candidate, entry)

    The candidates are what the completion gives as its answer, see `candidate_answers`. A wrong answer or none is 0,
    a right one 1; in between is what the task's scorer gives for coming close.

    Args:
        completions: (B,) texts, or chats whose last message is scored.
        task: (B,) names of tasks, such as "chain_sum"; a batch may mix them.
        entry: (B,) JSON of the entries that reasoning-gym generated: question, answer, metadata.
        task_options: (B,) JSON of the task's options, by which some scorers measure; none: the defaults.
        kwargs: Other columns and what TRL adds; not used.

    Returns:
        (B,) rewards in 0..1.

    Raises:
        LossConfigError: A column is missing or not JSON, reasoning-gym is not installed or does not know the task, or
            the task's scorer would run completions as program code.
    """
    missing = [name for name, column in (("task", task), ("entry", entry)) if column is None]
    if missing:
        raise LossConfigError(
            f"reasoning_gym_reward needs the data-set columns `task` and `entry`; missing: {', '.join(missing)}. "
            "`python scripts/prepare_data.py reasoning_gym` writes them"
        )
    options = task_options if task_options is not None else ["{}"] * len(completions)
    return [
        _score(completion, *columns) for completion, *columns in zip(completions, task, entry, options, strict=True)
    ]


def candidate_answers(text: str) -> list[str]:
    """What a completion gives as its answer: text inside <answer> tags, else after "Answer:", else its last line.

    The last of several tags or markers counts. A last line without a marker may be a sentence ("The sum is 12."), so
    that its last word is a candidate too; a list of guesses is not.
    """
    _, opened, after = text.rpartition("<answer>")
    if opened:
        return [after.partition("</answer>")[0].strip()]
    _, marked, after = text.rpartition("Answer:")
    if marked:
        return [after.strip()]
    lines = text.strip().splitlines()
    if not lines:
        return []
    return list(dict.fromkeys([lines[-1].strip(), lines[-1].split()[-1].rstrip(".")]))


def load_scorer(task: str, task_options: str = "{}") -> Any:
    """The task's data set of reasoning-gym, which holds its `score_answer`; one object for each task and options.

    Args:
        task: Name of the task.
        task_options: JSON object of its options.

    Raises:
        LossConfigError: As in `reasoning_gym_reward`.
    """
    if task in _RUN_THE_ANSWER:
        raise LossConfigError(
            f"the scorer of '{task}' in reasoning-gym runs the answer as Python code, so it is not used on what a "
            "model wrote; choose another task, or write a reward of your own in a sandbox"
        )
    return _scorer(task, task_options)


@functools.cache
def _scorer(task: str, task_options: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise LossConfigError(
            f"reasoning-gym is needed and cannot be imported ({error}): pip install 'trl-custom-losses[reasoning]'"
        ) from error
    options = _from_json("task_options", task_options)
    try:
        return reasoning_gym.create_dataset(task, **{"seed": 0, "size": 1} | options)
    except (AssertionError, TypeError, ValueError) as error:  # its three ways to refuse
        raise LossConfigError(f"reasoning-gym refuses the task '{task}' with options {options}: {error}") from error


def _from_json(column: str, text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as error:
        raise LossConfigError(f"column `{column}` must hold JSON objects as text; found {text!r}") from error
    if not isinstance(value, dict):
        raise LossConfigError(f"column `{column}` must hold JSON objects as text; found {text!r}")
    return value


def _score(completion: str | Sequence[dict[str, Any]], task: str, entry: str, task_options: str) -> float:
    text = completion if isinstance(completion, str) else _last_text(completion)
    scorer, known = load_scorer(task, task_options), _from_json("entry", entry)
    if "answer" not in known:
        raise LossConfigError(f"column `entry` must hold entries of reasoning-gym with an answer; found {entry!r}")
    return max((_checked(scorer, answer, known) for answer in candidate_answers(text)), default=0.0)


def _last_text(messages: Sequence[dict[str, Any]]) -> str:
    """The text of a chat's last message, whose content may be a list of parts."""
    content = messages[-1]["content"] if messages else ""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _checked(scorer: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception:
        # Scorers parse what the model wrote, and some stumble over what they cannot read: that is a wrong answer. An
        # entry that is at fault stumbles over the right answer too.
        scorer.score_answer(entry["answer"], entry)
        return 0.0
