"""Estimate the GPU memory that a recipe needs, term by term.

    python scripts/estimate_memory.py recipes/dpo/NAME.yaml [--launcher recipes/accelerate/FILE.yaml] [--gpus 8]
    python scripts/estimate_memory.py RECIPE --model_config path/to/config.json
    python scripts/estimate_memory.py --write          # brings the figures in the headers of all recipes up to date

Needs no GPU and no download. The arithmetic is in memory_arithmetic.py.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from memory_arithmetic import GB, Launcher, estimate
from model_sizes import model_config
from transformers import PretrainedConfig

from trl_custom_losses.errors import LossConfigError
from trl_custom_losses.trainers.launch import exit_with_message

ROOT = Path(__file__).parents[1]
#: A line of a header that says for what the figures below it are; written by `--write`.
HEADER = re.compile(r"^(# Memory: (\d+) GPUs?(?: with (\S+))?\n)(?:#   .*\n)*", re.MULTILINE)


def render(recipe: dict[str, Any], launcher: Launcher, config: PretrainedConfig) -> str:
    """The arithmetic as lines of a recipe's header."""
    found = estimate(recipe, launcher, config)
    text = f"{found.total:.2f} GB = {found.arithmetic()}"
    if found.host:
        text += f"; on the host {found.host / GB:.0f} GB for all GPUs"
    return "".join(f"#   {line}\n" for line in textwrap.wrap(text, 116, break_on_hyphens=False))


def with_figures(text: str) -> str:
    """A recipe's text with the lines under each `# Memory: ...` of its header as the arithmetic has them now."""
    recipe = yaml.safe_load(text)

    def fill(match: re.Match[str]) -> str:
        launcher = Launcher.read(ROOT / match[3] if match[3] else None, int(match[2]))
        return match[1] + render(recipe, launcher, model_config(recipe))

    return HEADER.sub(fill, text)


def main(arguments: list[str] | None = None) -> None:
    """Print the estimate of a recipe, or write those of all recipes into their headers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--launcher", type=Path, help="file of recipes/accelerate or recipes/deepspeed")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs of all machines")
    parser.add_argument("--model_config", help="config.json of a model that is not in the table")
    parser.add_argument("--write", action="store_true", help="update the headers of all recipes")
    options = parser.parse_args(arguments)
    if options.write:
        for path in sorted(ROOT.glob("recipes/*po/*.yaml")):
            path.write_text(with_figures(path.read_text()))
        return
    if options.recipe is None:
        raise LossConfigError("name a recipe, or give --write")
    recipe = yaml.safe_load(options.recipe.read_text())
    launcher = Launcher.read(options.launcher, options.gpus)
    found = estimate(recipe, launcher, model_config(recipe, options.model_config))
    print(f"{options.recipe.name}, {launcher.kind}, {launcher.gpus} GPU(s): GB on each")
    for name, size in found.terms.items():
        print(f"  {name:32}{size / GB:8.2f}")
    print(f"  {'sum':32}{found.total:8.2f}")
    if found.host:
        print(f"  {'on the host, for all GPUs':32}{found.host / GB:8.2f}")


if __name__ == "__main__":
    exit_with_message(main)
