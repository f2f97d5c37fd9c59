"""The evaluation script: figures against a forward pass made by hand, adapters against checkpoints, files, mistakes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer

from scripts.evaluate import main
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, LossConfigError
from trl_custom_losses.evaluation import models
from trl_custom_losses.evaluation.pairs import Pairs
from trl_custom_losses.evaluation.prompts import Prompts, Sampling, end_tokens, generation_config

from . import tiny

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}={{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a={% endif %}"
)


def save_adapter(base: Path, path: Path, seed: int, **options) -> PeftModel:
    """Write an adapter with random weights for the model in `base`."""
    torch.manual_seed(seed)
    arguments = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(tiny.load_model(base), LoraConfig(**arguments | options, task_type="CAUSAL_LM"))
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dense_model) -> Path:
    """A base model, two adapters for it, the first one merged into a checkpoint, and data."""
    path = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(dense_model, path / "base")
    save_adapter(path / "base", path / "second", seed=2, modules_to_save=["lm_head"])
    save_adapter(path / "base", path / "adapter", seed=1).merge_and_unload().save_pretrained(path / "merged")
    AutoTokenizer.from_pretrained(dense_model).save_pretrained(path / "merged")
    write(path / "pairs.jsonl", tiny.preference_data())
    write(path / "prompts.jsonl", tiny.prompt_data(4))
    return path


def write(path: Path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def words(folder: Path, *trained: str, pairs: str = "", prompts: str = "", reward: str = "count_reward") -> list[str]:
    """A command line that compares `trained` with the base."""
    line = ["--base", str(folder / "base"), "--device", "cpu", "--max_completion_length", "6"]
    line += ["--trained", *(str(folder / name) for name in trained)] if trained else []
    line += ["--pairs", str(folder / pairs)] if pairs else []
    return line + (["--prompts", str(folder / prompts), "--reward", f"{__name__}:{reward}"] if prompts else [])


def section(results: dict, task: str, name: str) -> dict:
    (found,) = [value for path, value in results[task]["models"].items() if Path(path).name == name]
    return found


count_reward, length_reward = tiny.count_reward, tiny.length_reward


def short_reward(completions, **kwargs):
    return [1.0]


def zero_reward(completions, **kwargs):
    return [0.0] * len(completions)


async def even_reward(completions, answer, trainer_state, log_metric, **kwargs):
    """Right where the answer is even, which the completion has no part in; not scored where it is 0."""
    log_metric("seen", len(completions))
    return [None if text == "0" else float(int(text) % 2 == 0) for text in answer]


def hand_logps(folder: Path, rows, side: str) -> np.ndarray:
    """Summed log-probabilities, one unpadded sequence at a time."""
    model, tokenizer, sums = tiny.load_model(folder), AutoTokenizer.from_pretrained(folder), []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        sums.append(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
    return np.array(sums)


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_the_figures_of_pairs_are_those_of_a_forward_pass_made_by_hand(folder, batch_size):
    line = [*words(folder, "merged", pairs="pairs.jsonl"), "--beta", "0.3", "--batch_size", batch_size]
    results, rows = main(line), tiny.preference_data()
    sums = {
        (name, side): hand_logps(folder / name, rows, side)
        for name in ("base", "merged")
        for side in ("chosen", "rejected")
    }
    for name in ("base", "merged"):
        figures = section(results, "pairs", name)["figures"]
        chosen, rejected = sums[name, "chosen"], sums[name, "rejected"]
        by_length = [  # a space is the unknown token here, which decodes to nothing
            logps / np.array([len(text.replace(" ", "")) for text in rows[side]])
            for side, logps in (("chosen", chosen), ("rejected", rejected))
        ]
        assert figures["logp_chosen"] == pytest.approx(chosen.mean(), rel=1e-5)
        assert figures["logp_rejected"] == pytest.approx(rejected.mean(), rel=1e-5)
        assert figures["logp_margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)
        assert figures["logp_accuracy"] == np.mean(chosen > rejected)
        assert figures["acc_per_character"] == np.mean(by_length[0] > by_length[1])
    margins = 0.3 * (
        (sums["merged", "chosen"] - sums["base", "chosen"]) - (sums["merged", "rejected"] - sums["base", "rejected"])
    )
    trained = section(results, "pairs", "merged")
    assert trained["figures"]["reward_accuracy"] == np.mean(margins > 0)
    assert trained["figures"]["reward_margin"] == pytest.approx(margins.mean(), rel=1e-3, abs=1e-5)
    assert trained["figures"]["reward_nll"] == pytest.approx(np.logaddexp(0, -margins).mean(), rel=1e-4)
    assert trained["standard_errors"]["reward_margin"] == pytest.approx(margins.std(ddof=1) / math.sqrt(8), rel=1e-3)
    (change,) = results["pairs"]["differences"].values()
    changes = sums["merged", "chosen"] - sums["base", "chosen"]
    assert change["logp_chosen"]["difference"] == pytest.approx(changes.mean(), rel=1e-3)
    assert change["logp_chosen"]["se"] == pytest.approx(changes.std(ddof=1) / math.sqrt(8), rel=1e-3)


def test_the_figures_of_pairs_are_those_that_the_trainer_logs(folder, run_arguments):
    """TRL's own evaluation of the same model against the same reference, in one batch."""
    arguments = CustomDPOConfig(**run_arguments, beta=0.3, per_device_eval_batch_size=8, max_length=None)
    trainer = CustomDPOTrainer(
        model=str(folder / "merged"),
        ref_model=tiny.load_model(folder / "base"),
        args=arguments,
        train_dataset=tiny.preference_data(),
        eval_dataset=tiny.preference_data(),
    )
    logged = trainer.evaluate()
    results = main([*words(folder, "merged", pairs="pairs.jsonl"), "--beta", "0.3"])
    figures = section(results, "pairs", "merged")["figures"]
    for ours, theirs in {
        "logp_chosen": "eval_logps/chosen",
        "logp_rejected": "eval_logps/rejected",
        "reward_accuracy": "eval_rewards/accuracies",
        "reward_margin": "eval_rewards/margins",
        "reward_nll": "eval_loss",
    }.items():
        assert figures[ours] == pytest.approx(logged[theirs], rel=1e-4, abs=1e-6), ours


def test_an_adapter_and_its_merged_checkpoint_give_the_same(folder):
    """With another adapter between, which must leave nothing behind on the base."""
    line = words(folder, "merged", "second", "adapter", pairs="pairs.jsonl", prompts="prompts.jsonl")
    results = main(line)
    for task in ("pairs", "prompts"):
        merged, adapter = (section(results, task, name)["figures"] for name in ("merged", "adapter"))
        assert adapter == pytest.approx(merged, rel=1e-4, abs=1e-5, nan_ok=True)
        other = section(results, task, "second")["figures"]
        assert other != pytest.approx(merged, rel=1e-2, nan_ok=True)
    alone = main(words(folder, "second", pairs="pairs.jsonl"))
    assert section(alone, "pairs", "second") == section(results, "pairs", "second")


def test_an_adapter_that_writes_into_the_base_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    """Biases and an initialisation that takes from the weights; the base is loaded again only after these."""
    base, loads = folder / "base", []
    load = models._load
    monkeypatch.setattr(models, "_load", lambda name, precision: loads.append(Path(name).name) or load(name, precision))
    alone = section(main(words(folder, "second", pairs="pairs.jsonl")), "pairs", "second")
    for name, change in {"biases": {"bias": "all"}, "pissa": {"init_lora_weights": "pissa"}}.items():
        model = save_adapter(base, tmp_path / name, seed=3, **change)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name)
        model.merge_and_unload().save_pretrained(tmp_path / "whole" / name)
        loads.clear()
        line = [*words(folder, pairs="pairs.jsonl"), "--trained", str(folder / "adapter"), str(tmp_path / name)]
        results = main([*line, str(folder / "second"), str(tmp_path / "whole" / name / ".")])
        assert loads == ["base", "base", name], loads
        assert section(results, "pairs", "second") == alone
        two = [value["figures"] for path, value in results["pairs"]["models"].items() if Path(path).name == name]
        assert len(two) == 2 and two[0] == pytest.approx(two[1], rel=1e-4, abs=1e-5)


def test_a_copy_of_the_base_differs_in_nothing(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "copy")
    line = words(folder, pairs="pairs.jsonl", prompts="prompts.jsonl")
    results = main([*line, "--trained", str(tmp_path / "copy"), "--num_generations", "2"])
    for task in ("pairs", "prompts"):
        for changes in results[task]["differences"].values():
            assert changes and all(found["difference"] == 0 for found in changes.values())
    figures = section(results, "pairs", "copy")["figures"]
    assert figures["reward_accuracy"] == 0.5 and figures["reward_nll"] == pytest.approx(math.log(2))
    one, two = results["prompts"]["generations"].values()
    assert one == two and len(one) == 4 and len(one[0]["completions"]) == 2


def test_the_results_are_printed_and_written(folder, tmp_path, capsys):
    line = words(folder, "adapter", pairs="pairs.jsonl", prompts="prompts.jsonl")
    results = main([*line, "--limit", "3", "--seed", "7", "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "results.json").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]
    saved = json.loads(text)
    assert saved["pairs"]["pairs"] == saved["prompts"]["prompts"] == 3
    assert (
        saved["seed"] == saved["arguments"]["seed"] == 7 and saved["versions"]["torch"] and saved["dtype"] == "float32"
    )
    assert saved["pairs"]["differences"] == json.loads(json.dumps(results["pairs"]["differences"]))
    assert len(next(iter(saved["prompts"]["generations"].values()))[0]["completions"]) == 4
    printed = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    head, accuracy = printed[0], printed[2]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["figure", "base", "adapter", "adapter - base"]
    figure = section(saved, "pairs", "adapter")["figures"]["logp_accuracy"]
    assert accuracy.startswith("| logp_accuracy") and f"{figure:.3f} ± " in accuracy
    assert len({len(row) for row in printed[: printed.index(printed[0], 1) if printed[0] in printed[1:] else 7]}) == 1


def test_one_example_has_no_standard_error_and_the_file_stays_json(folder, tmp_path):
    main([*words(folder, pairs="pairs.jsonl"), "--limit", "1", "--output", str(tmp_path)])
    saved = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert section(saved, "pairs", "base")["standard_errors"]["logp_accuracy"] is None


def test_what_rewards_say(folder):
    """Answers 0, 4, 8, 12 are even; completions for the answer 0 are not scored."""
    line = words(folder, "adapter", prompts="prompts.jsonl", reward="even_reward")
    results = main([*line, "--num_generations", "3"])
    figures = section(results, "prompts", "base")["figures"]
    assert figures["unscored"] == 0.25 and figures["score"] == figures["accuracy"] == figures["pass@2"] == 1
    assert "pass@4" not in figures
    (changes,) = results["prompts"]["differences"].values()
    assert changes["score"] == {"difference": 0, "se": 0, "n": 3} and changes["length"]["n"] == 4
    outside = main(words(folder, prompts="prompts.jsonl", reward="length_reward"))
    figures = section(outside, "prompts", "base")["figures"]
    assert figures["score"] < 0 and "accuracy" not in figures


def test_messages_are_tokenized_by_the_template(folder, tmp_path):
    """A conversation equals the text that the template makes of it."""
    shutil.copytree(folder / "base", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    question, good, bad = ([{"role": r, "content": c}] for r, c in [("user", "hi"), ("assistant", "yes"), ("a", "no")])
    chat = {"prompt": question, "chosen": good, "rejected": bad}
    whole = {"chosen": question + good, "rejected": question + bad}  # the prompt is what both begin with
    found = []
    for rows in ([chat], [whole]):
        line = words(tmp_path, pairs=write(tmp_path / "chat.jsonl", rows), prompts="")
        found.append(section(main(line), "pairs", "base")["figures"])
    model, begun = tiny.load_model(tmp_path / "base"), tokenizer("u=hi a=")["input_ids"]
    for figures in found:
        for side, text in (("chosen", "yes"), ("rejected", "no")):
            ids = torch.tensor([tokenizer(f"u=hi a={text} ")["input_ids"]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert figures[f"logp_{side}"] == pytest.approx(logps[len(begun) - 1 :].sum().item(), rel=1e-5)
    prompts = Prompts(tiny.Dataset.from_list([chat]), tokenizer)
    assert prompts.ids == [begun]
    seen = {}
    sampling = Sampling(num_generations=1)
    config = generation_config(end_tokens(model, tokenizer), tokenizer, sampling)
    prompts.generate(model, config, sampling, lambda **given: seen.update(given) or [1.0])
    assert seen["prompts"] == [question] and seen["completions"][0][0]["role"] == "assistant"


def test_long_pairs_are_cut_or_left_out_and_counted(folder):
    results = main([*words(folder, pairs="pairs.jsonl"), "--max_length", "12"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in tiny.preference_data()]
    counts = results["pairs"]
    assert counts["left_out"] == sum(length >= 12 for length in lengths) > 0
    assert counts["pairs"] == 8 - counts["left_out"] and 0 < counts["truncated"] <= counts["pairs"]
    pairs = Pairs(tiny.preference_data(), tokenizer, 12)
    assert pairs.characters["chosen"].tolist() == [5, 6, 5, 4, 3, 2, 1]  # the first whole, with 7 - 1 tokens left


def with_pairs(*more: str):
    return lambda folder, tmp_path: [*words(folder, pairs="pairs.jsonl"), *(part.format(tmp_path) for part in more)]


def with_rows(option: str, rows: list[dict]):
    def line(folder: Path, tmp_path: Path) -> list[str]:
        reward = ["--reward", f"{__name__}:count_reward"] if option == "--prompts" else []
        return [*words(folder), option, write(tmp_path / "rows.jsonl", rows), *reward]

    return line


_TURN = [{"role": "assistant", "content": "b"}]
_CHAT = [{"prompt": [{"role": "user", "content": "a"}], "chosen": _TURN, "rejected": _TURN}]
MISTAKES = {
    "nothing to evaluate on": lambda folder, _: words(folder),
    "`--prompts` and `--reward` go together": lambda folder, _: words(folder, prompts="prompts.jsonl")[:-2],
    "count_rewad": lambda folder, _: words(folder, prompts="prompts.jsonl", reward="count_rewad"),
    "gave 1 rewards for 16": lambda folder, _: words(folder, prompts="prompts.jsonl", reward="short_reward"),
    "no column 'chosen' and no 'rejected'; they have a": with_rows("--pairs", [{"a": 1}]),
    "no column 'prompt'; they have a": with_rows("--prompts", [{"a": 1}]),
    "could not read the data": with_rows("--pairs", []),
    "cannot be tokenized.*chat.template": with_rows("--pairs", _CHAT),
    "prompts cannot be tokenized.*chat.template": with_rows("--prompts", _CHAT),
    "no file or folder": with_pairs("--pairs", "{}/none.jsonl"),
    "no split 'dev'; they have train": with_pairs("--split", "dev"),
    "there is no folder": with_pairs("--trained", "{}/none"),
    "could not load a model": with_pairs("--trained", "{}"),
    "given more than once": with_pairs("--trained", "a", "a"),
    "given more than once: .*/\\.$": with_pairs("--trained", "{0}", "{0}/."),
    "must be a function, not of type str": lambda folder, _: words(folder, prompts="prompts.jsonl", reward="TEMPLATE"),
    "`chat_template_kwargs` must be a JSON object, not 'x=1': Exp": with_pairs("--chat_template_kwargs", "x=1"),
    "`chat_template_kwargs` must be a JSON object, not '3'": with_pairs("--chat_template_kwargs", "3"),
    "is an adapter; give the model": lambda folder, _: [
        *words(folder, pairs="pairs.jsonl"), "--base", str(folder / "adapter"), "--tokenizer", str(folder / "base")
    ],
    "`limit` must be at least 1, not 0": with_pairs("--limit", "0"),
    "`beta` must be positive": with_pairs("--beta", "0"),
    "no pair is left": with_pairs("--max_length", "1"),
    "sees no GPU": with_pairs("--device", "cuda"),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_says_what_is_wrong(folder, tmp_path, message):
    if message == "sees no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(LossConfigError, match=message):
        main(MISTAKES[message](folder, tmp_path))


def test_an_adapter_of_another_base_is_refused(folder, tmp_path):
    """Weights of another shape, for more layers, and of a kind that is not put on weights."""
    base = tiny.load_model(folder / "base")
    cases = {"wide": {"hidden_size": 32}, "deep": {"num_hidden_layers": 3}}
    for name, change in cases.items():
        config = type(base.config)(**base.config.to_dict() | change | {"layer_types": None})
        type(base)(config).save_pretrained(tmp_path / f"{name}-base")
        save_adapter(tmp_path / f"{name}-base", tmp_path / name, seed=0)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, prompt).save_pretrained(tmp_path / "prompt")
    for name, message in {
        "wide": "does not fit the base .*size mismatch",
        "deep": "does not fit the base .*4 of its weights have no place in it and 0 are missing",
        "prompt": "adapter of type PROMPT_TUNING",
    }.items():
        with pytest.raises(LossConfigError, match=message):
            main([*words(folder, pairs="pairs.jsonl"), "--trained", str(tmp_path / name)])


def test_another_tokenizer_is_warned_of(folder, tmp_path, caplog):
    shutil.copytree(folder / "merged", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "merged")
    main([*words(folder, "merged", pairs="pairs.jsonl")])
    assert "has another chat template" not in caplog.text
    main([*words(folder, pairs="pairs.jsonl"), "--trained", str(tmp_path / "merged")])
    assert "has another chat template than" in caplog.text


def run(*line: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *line], capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


def test_the_script_runs_from_its_own_folder_and_ends_mistakes_with_one_line(folder, tmp_path):
    script = str(ROOT / "scripts" / "evaluate.py")
    done = run(script, *words(folder, pairs="pairs.jsonl"), cwd=tmp_path)
    assert done.returncode == 0 and "| reward" not in done.stdout and "| logp_accuracy" in done.stdout, done.stderr
    failed = run(script, *words(folder, pairs="pairs.jsonl"), "--limit", "0", cwd=tmp_path)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1] == "error: `limit` must be at least 1, not 0"


@pytest.mark.parametrize("first", ["scripts", ""])
def test_the_script_does_not_hide_the_package_of_its_name(first):
    """With its folder first in the path, as in `python scripts/train_dpo.py` or as the current one."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / first) if first else ""!r}, {str(ROOT)!r}]
before = list(sys.path)
import evaluate
from evaluate.utils import logging
assert evaluate.__path__ and evaluate.load and sys.modules["evaluate"] is evaluate
assert sys.path == before
import addition_task, scripts.evaluate
assert scripts.evaluate.main and sys.modules["evaluate"] is evaluate
"""
    done = run("-c", program, cwd=ROOT / "scripts")
    assert done.returncode == 0, done.stderr
