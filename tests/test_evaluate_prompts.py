"""The evaluation script on prompts: what is generated, by which settings, and what its rewards say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from scripts.evaluate import main
from trl_custom_losses.evaluation.figures import paired_differences
from trl_custom_losses.evaluation.pairs import Pairs
from trl_custom_losses.evaluation.prompts import Generated, Prompts, Sampling, end_tokens, generation_config

from . import tiny
from .test_evaluate import save_adapter, section, words, write

THINKING = (
    "{{ 'yes' if enable_thinking is not defined or enable_thinking else 'no' }} "
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dense_model) -> Path:
    """A base model, an adapter and prompts."""
    path = tmp_path_factory.mktemp("prompts")
    shutil.copytree(dense_model, path / "base")
    save_adapter(path / "base", path / "adapter", seed=1)
    write(path / "prompts.jsonl", tiny.prompt_data(4))
    return path


DEFAULTS = {
    "min_p": 0.9,
    "num_beams": 3,
    "num_return_sequences": 2,
    "suppress_tokens": list(range(3, 40)),
    "min_new_tokens": 6,
    "stop_strings": ["1"],
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_generation_defaults_of_a_checkpoint_change_nothing(folder, tmp_path, name):
    """Neither a checkpoint's nor those of the base, which an adapter has too."""
    for place in ("base", "copy"):
        shutil.copytree(folder / "base", tmp_path / place)
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    write(tmp_path / "prompts.jsonl", tiny.prompt_data(4))
    line = words(tmp_path, "adapter", "copy", prompts="prompts.jsonl")
    without = main(line)["prompts"]["generations"]
    for place in ("copy", "base"):
        path = tmp_path / place / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, name: DEFAULTS[name]}))
        assert main(line)["prompts"]["generations"] == without


def test_the_model_gets_its_defaults_back(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder / "base"), tiny.load_model(folder / "base")
    own = model.generation_config = GenerationConfig(min_p=0.5, eos_token_id=[5, 1])
    assert end_tokens(model, tokenizer) == [1, 5]
    prompts, sampling = Prompts(tiny.prompt_data(1), tokenizer), Sampling(num_generations=1)
    config = generation_config([1], tokenizer, sampling)
    prompts.generate(model, config, sampling, tiny.count_reward)
    assert model.generation_config is own
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prompts.generate(model, config, sampling, tiny.count_reward)
    assert model.generation_config is own and own.min_p == 0.5


def test_all_models_end_with_the_end_tokens_of_the_base(folder, tmp_path, caplog):
    shutil.copytree(folder / "base", tmp_path / "copy")
    path = tmp_path / "copy" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, *range(3, 30)]}))
    results = main([*words(folder, prompts="prompts.jsonl"), "--trained", str(tmp_path / "copy"), "--seed", "3"])
    base, copy = results["prompts"]["generations"].values()
    assert base == copy
    assert "has the end tokens [1, 3, 4, 5" in caplog.text and "completions end with [1]" in caplog.text
    settings = results["prompts"]["generation"]
    assert settings["eos_token_id"] == [1] and settings["max_new_tokens"] == 6 and settings["seed"] == 3
    assert settings["top_k"] == 0 and settings["do_sample"] and settings["num_generations"] == 4


def test_greedy_completions_are_the_likeliest_tokens(folder, tmp_path):
    """For prompts of different lengths, which are padded."""
    rows = [{"prompt": prompt} for prompt in ("a", "12+34=", "say abc?")]
    results = main([*words(folder, prompts=write(tmp_path / "ragged.jsonl", rows)), "--temperature", "0"])
    model, tokenizer = tiny.load_model(folder / "base"), AutoTokenizer.from_pretrained(folder / "base")
    (examples,) = results["prompts"]["generations"].values()
    for example in examples:
        ids = tokenizer(example["prompt"], return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        while ids.shape[1] < start + 6 and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert example["completions"] == [tokenizer.decode(ids[0, start:], skip_special_tokens=True)]


def test_completions_end_with_the_end_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    prompts = Prompts(tiny.prompt_data(4), tokenizer)
    model, sampling = tiny.load_model(folder / "base"), Sampling(num_generations=8, max_completion_length=40)
    config = generation_config(end_tokens(model, tokenizer), tokenizer, sampling)
    generated = prompts.generate(model, config, sampling, tiny.count_reward)
    end = tokenizer.eos_token_id
    assert len(generated.ids) == 32 and any(generated.finished) and not all(generated.finished)
    for ids, finished in zip(generated.ids, generated.finished, strict=True):
        assert (ids.index(end) == len(ids) - 1) if finished else (end not in ids and len(ids) == 40)
    figures = prompts.figures(generated, sampling).values
    assert figures["truncated"] == 1 - np.mean(generated.finished)
    assert figures["length"] == np.mean([len(ids) for ids in generated.ids])


def test_every_prompt_counts_once_in_the_score_and_in_its_difference():
    """Two completions of the first prompt are scored and one of the second, none of the third."""
    none = float("nan")
    prompts = Prompts(tiny.prompt_data(3), tiny.tokenizer())
    figures = [
        prompts.figures(Generated(["a"] * 6, [[1]] * 6, [True] * 6, scores), Sampling(num_generations=2))
        for scores in ([1.0, 1.0, 0.0, none, none, none], [1.0, 0.0, 1.0, none, none, none])
    ]
    base, trained = figures
    assert base.values["score"] == base.values["accuracy"] == base.values["pass@1"] == 0.5
    assert base.errors["score"] == base.errors["accuracy"] == 0.5 and trained.values["score"] == 0.75
    for name in ("score", "accuracy"):
        change = paired_differences(trained, base)[name]
        assert change["n"] == 2
        assert change["difference"] == trained.values[name] - base.values[name] == 0.25
    assert base.values["unscored"] == 0.5


def test_reward_functions_get_the_columns_that_trl_gives_them(folder):
    """Not a column of completions' tokens, and TRL's own values before columns of the same name."""
    rows = tiny.prompt_data(2).add_column("completion_ids", [[1], [2]]).add_column("completion", ["a", "b"])
    rows = rows.add_column("log_metric", ["a", "b"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder / "base"), tiny.load_model(folder / "base")
    sampling, seen = Sampling(num_generations=1, max_completion_length=2), {}
    config = generation_config([1], tokenizer, sampling)
    generated = Prompts(rows, tokenizer).generate(
        model, config, sampling, lambda **given: seen.update(given) or [1.0, 1.0]
    )
    assert seen["completion_ids"] == generated.ids and "completion" not in seen and callable(seen["log_metric"])
    assert seen["answer"] == rows["answer"][:]


def test_arguments_of_the_chat_template_are_for_every_row_that_has_none_of_its_own(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = THINKING
    turns = {side: [{"role": "assistant", "content": "b"}] for side in ("chosen", "rejected")}
    plain = {"prompt": [{"role": "user", "content": "a"}], **turns}
    rows = tiny.Dataset.from_list([plain | {"chat_template_kwargs": own} for own in (None, {"enable_thinking": True})])
    yes, no = (tokenizer(f"{word} a ")["input_ids"] for word in ("yes", "no"))
    assert Prompts(rows, tokenizer).ids == [yes, yes]
    assert Prompts(rows, tokenizer, {"enable_thinking": False}).ids == [no, yes]
    assert Prompts(rows.remove_columns("chat_template_kwargs"), tokenizer, {"enable_thinking": False}).ids == [no, no]
    assert Pairs(rows, tokenizer, template={"enable_thinking": False}).tokens["prompt_ids"][:] == [no, yes]


def test_the_command_line_hands_arguments_of_the_chat_template_to_pairs_and_prompts(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(tmp_path / "base")
    turn = [{"role": "assistant", "content": "b"}]
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": turn, "rejected": turn}
    write(tmp_path / "rows.jsonl", [row])
    line = [*words(tmp_path, pairs="rows.jsonl", prompts="rows.jsonl", reward="zero_reward"), "--temperature", "0"]
    found = [main([*line, "--chat_template_kwargs", f'{{"enable_thinking": {value}}}']) for value in ("true", "false")]
    yes, no = (section(results, "pairs", "base")["figures"]["logp_chosen"] for results in found)
    assert yes != pytest.approx(no, rel=1e-3)
    yes, no = (next(iter(results["prompts"]["generations"].values())) for results in found)
    assert yes != no and found[1]["prompts"]["generation"]["chat_template_kwargs"] == {"enable_thinking": False}
