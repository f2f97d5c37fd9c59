"""The command: arguments, the run over all models, and the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import GenerationConfig
from trl import DatasetMixtureConfig, ScriptArguments

from ..errors import LossConfigError
from ..trainers.announce import logger
from ..trainers.launch import load_data, load_reward, look_beside_the_caller
from .figures import Figures, paired_differences
from .models import Precision, first_line, load_tokenizer, models
from .pairs import PairLogps, Pairs
from .prompts import Generated, Prompts, Sampling, end_tokens, generation_config
from .report import environment, table, write_json
from .template import read_template_options

_SHOWN_PROMPTS = 5


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        LossConfigError: An argument is out of its range, or goes with another that is missing.
    """
    parser = argparse.ArgumentParser(prog="evaluate", description="Compare a base model with what was trained from it.")
    add = parser.add_argument
    add("--base", required=True, help="folder or hub name of the base model, with full weights")
    add("--trained", nargs="+", default=[], help="checkpoints with full weights or adapters for the base, any number")
    add("--tokenizer", help="tokenizer for all models (default: the base's)")
    add("--pairs", help="data with chosen, rejected and prompt: a file (jsonl, json, csv, parquet), folder or hub name")
    add("--prompts", help="data with prompt and the columns that the reward function reads, likewise")
    add("--split", help="split of both (default: the only one, else 'test')")
    add(
        "--reward", help="'package.module:function' with the signature of TRL's reward functions, or one of TRL's names"
    )
    add("--beta", type=float, default=0.1, help="strength of the implicit reward: that of the training (default: 0.1)")
    add("--n_bins", type=int, default=15, help="bins of the calibration error (default: 15)")
    add("--max_length", type=int, help="tokens of prompt and completion kept from a pair (default: all)")
    add("--num_generations", type=int, default=4, help="completions a prompt (default: 4)")
    add("--max_completion_length", type=int, default=64, help="tokens generated at most (default: 64)")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 decodes greedily (default: 1.0)")
    add(
        "--chat_template_kwargs",
        default="{}",
        help="arguments of the chat template as JSON, as in GRPO's config; a row's own column comes before them",
    )
    add("--limit", type=int, help="use the first so many pairs and prompts")
    add("--batch_size", type=int, default=8, help="pairs or completions at once (default: 8)")
    add("--seed", type=int, default=0, help="of sampling, the same for every model (default: 0)")
    add("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--output", type=Path, help="folder for results.json")
    options = parser.parse_args(arguments)
    for name in ("n_bins", "max_length", "num_generations", "max_completion_length", "limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise LossConfigError(f"`{name}` must be at least 1, not {value}")
    if options.beta <= 0 or options.temperature < 0:
        raise LossConfigError("`beta` must be positive and `temperature` not negative")
    if not options.pairs and not options.prompts:
        raise LossConfigError("nothing to evaluate on: give `--pairs`, or `--prompts` with `--reward`")
    if bool(options.prompts) != bool(options.reward):
        raise LossConfigError("`--prompts` and `--reward` go together")
    options.chat_template_kwargs = read_template_options(options.chat_template_kwargs)
    places = [_place(name) for name in (options.base, *options.trained)]
    repeated = {name for name in options.trained if places.count(_place(name)) > 1}
    if repeated:
        raise LossConfigError(f"given more than once: {', '.join(sorted(repeated))}")
    if options.temperature == 0 and options.num_generations > 1:
        logger.warning("`temperature` is 0: one completion a prompt, since all would be the same")
        options.num_generations = 1
    return options


def _place(name: str) -> str:
    """What tells whether two names are the same model: where a folder lies, or a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate as the arguments say, print the tables and write the results; returns what was written.

    Raises:
        LossConfigError: The arguments, the data or a model are not usable.
    """
    options = parse(arguments)
    look_beside_the_caller()
    reward = load_reward(options.reward) if options.reward else None
    precision = Precision.choose(options.device, options.dtype)
    tokenizer = load_tokenizer(options.tokenizer or options.base)
    pairs = prompts = None
    if options.pairs:
        pairs = Pairs(_rows(options.pairs, options), tokenizer, options.max_length, options.chat_template_kwargs)
    if options.prompts:
        prompts = Prompts(_rows(options.prompts, options), tokenizer, options.chat_template_kwargs)
    sampling = Sampling(
        num_generations=options.num_generations,
        max_completion_length=options.max_completion_length,
        temperature=options.temperature,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    logps: dict[str, PairLogps] = {}
    generated: dict[str, Generated] = {}
    config: GenerationConfig | None = None
    for name, model in models(options.base, options.trained, precision, tokenizer):
        logger.info("Evaluating %s", name)
        if pairs is not None:
            logps[name] = pairs.logps(model, options.batch_size)
        if prompts is not None and reward is not None:
            ends = end_tokens(model, tokenizer)
            config = config or generation_config(ends, tokenizer, sampling)  # the base is the first
            if set(ends) - set(config.eos_token_id):
                logger.warning(
                    "'%s' has the end tokens %s, but for all models completions end with %s, those of the base and of "
                    "the tokenizer; `--tokenizer` chooses.",
                    *(name, ends, config.eos_token_id),
                )
            generated[name] = prompts.generate(model, config, sampling, reward)
        del model
    order = [options.base, *options.trained]
    results: dict[str, Any] = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        **environment(precision.device, precision.dtype),
        "seed": options.seed,
    }
    if pairs is not None:
        found = {
            name: pairs.figures(
                logps[name], logps[options.base] if name != options.base else None, options.beta, options.n_bins
            )
            for name in order
        }
        counts = {"pairs": len(pairs), "left_out": pairs.left_out, "truncated": pairs.truncated}
        results["pairs"] = counts | _section(f"Pairs ({len(pairs)})", found)
    if prompts is not None and config is not None:
        found = {name: prompts.figures(generated[name], sampling) for name in order}
        section = _section(f"Prompts ({len(prompts)}, {sampling.num_generations} completions each)", found)
        examples = {name: _examples(prompts, generated[name], sampling.num_generations) for name in order}
        settings = {
            **config.to_diff_dict(),
            **asdict(sampling),
            "chat_template_kwargs": options.chat_template_kwargs,
        }
        results["prompts"] = {"prompts": len(prompts), "generation": settings} | section | {"generations": examples}
    if options.output:
        write_json(options.output / "results.json", results)
        print(f"Written to {options.output / 'results.json'}")
    return results


def _section(title: str, figures: dict[str, Figures]) -> dict[str, Any]:
    """Print the table of one task; returns its part of the results."""
    base, *trained = figures
    differences = {name: paired_differences(figures[name], figures[base]) for name in trained}
    print(f"\n{title}\n\n{table(figures, differences)}\n")
    return {
        "models": {name: {"figures": found.values, "standard_errors": found.errors} for name, found in figures.items()},
        "differences": differences,
    }


def _examples(prompts: Prompts, generated: Generated, repeats: int) -> list[dict[str, Any]]:
    """The completions of the first few prompts, with their scores."""
    return [
        {
            "prompt": row["prompt"],
            "completions": generated.texts[index * repeats : (index + 1) * repeats],
            "scores": generated.scores[index * repeats : (index + 1) * repeats],
        }
        for index, row in enumerate(prompts.rows[:_SHOWN_PROMPTS])
    ]


def _rows(name: str, options: argparse.Namespace) -> Dataset:
    """The first `limit` rows of the split."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise LossConfigError(f"there is no file or folder '{name}'")
    try:
        data = load_data(ScriptArguments(dataset_name=name), DatasetMixtureConfig())
    except LossConfigError:
        raise
    except Exception as error:  # `datasets` has many kinds: a broken file, no such name, no network
        raise LossConfigError(f"could not read the data '{name}': {first_line(error)}") from error
    split = options.split or (next(iter(data)) if len(data) == 1 else "test")
    if split not in data:
        raise LossConfigError(f"the data '{name}' have no split '{split}'; they have {', '.join(data)}")
    rows = data[split]
    assert not isinstance(rows, IterableDataset)  # `load_data` streams only when asked to
    return rows.select(range(min(len(rows), options.limit or len(rows))))
