"""Train one small model with DPO and with GRPO, each with a loss from the registry, and show what changed.

    bash scripts/quickstart.sh                       # installs on the first run, then takes two to three minutes
    bash scripts/quickstart.sh --seeds 0 1 2         # mean and spread over three base models
    bash scripts/quickstart.sh --dpo-loss hinge      # another loss: a name, or JSON with `type` and hyperparameters
    bash scripts/quickstart.sh --model smollm2       # SmolLM2-135M-Instruct with LoRA instead of the tiny model

A model of 0.86 million parameters first learns two-digit addition from scratch until it solves about half of the
problems (kept in a cache). DPO then prefers the true answer to the model's own wrong one; GRPO samples answers and
rewards the right ones. Accuracy is measured on problems that neither pretraining nor the trainers have seen.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn when the data loader forks

import datasets
import torch
import transformers
from addition_task import PretrainConfig, Task, accuracy, addition_task, cache_root, greedy_answers
from quickstart_report import Outcome, print_tables, write_figure, write_results
from transformers import ProgressCallback, Trainer, TrainingArguments

from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    CustomGRPOConfig,
    CustomGRPOTrainer,
    LossConfigError,
)
from trl_custom_losses.callbacks import GradientMonitorCallback, RunReportCallback

# `sigmoid` alone makes the wrong answers less likely, but the right ones with them; the `sft` term holds those up.
# `--dpo-loss sigmoid` and `--dpo-loss sft` show what each does alone.
DPO_LOSS = {
    "type": "composed",
    "components": [
        {"type": "sigmoid", "name": "pref", "weight": 1.0, "beta": 0.1},
        {"type": "sft", "name": "sft", "weight": 1.0},
    ],
}
GRPO_LOSS = {"type": "dr_grpo"}
#: The report shows which component of the loss drives the model, looked at every so many optimizer steps.
_MONITORED = 10


@dataclass(frozen=True)
class Settings:
    """How long and how fast one trainer runs.

    `batch_size` counts pairs for DPO and completions for GRPO, per optimizer step.
    """

    steps: int
    batch_size: int
    learning_rate: float
    logging_steps: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


SETTINGS: dict[str, dict[str, Settings]] = {
    "tiny": {
        "dpo": Settings(steps=60, batch_size=64, learning_rate=2e-4),
        "grpo": Settings(steps=300, batch_size=64, learning_rate=3e-4, logging_steps=5, extra={"num_generations": 8}),
    },
    "smollm2": {
        "dpo": Settings(steps=10, batch_size=8, learning_rate=3e-4),
        "grpo": Settings(steps=10, batch_size=32, learning_rate=3e-4, extra={"num_generations": 8}),
    },
}
FAST_PRETRAINING = PretrainConfig(
    hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_steps=20, n_validation=50, n_held_out=100
)


class LabelledProgress(ProgressCallback):
    """The Trainer's progress bar with a label, and the newest numbers in the bar instead of a line for each log."""

    shown = ("loss", "reward", "rewards/accuracies")

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix({key: f"{logs[key]:.3g}" for key in self.shown if key in logs})


def solved(model: Any, task: Task) -> float:
    """Share (0..1) of the held-out problems that the model answers exactly."""
    return accuracy(greedy_answers(model, task, task.split.held_out), task.split.held_out)


# For losses that read labels: here, an answer is "unsafe" when it is wrong.
UNSAFE = {"chosen_unsafe": 0.0, "rejected_unsafe": 1.0}


def preference_pairs(task: Task, model: Any, n_pairs: int) -> datasets.Dataset:
    """Up to `n_pairs` training problems that the model gets wrong: the true answer against the model's own."""
    rows: list[dict[str, str]] = []
    for start in range(0, len(task.split.train), task.eval_batch_size):
        problems = task.split.train[start : start + task.eval_batch_size]
        answers = greedy_answers(model, task, problems)
        rows += [
            {"prompt": problem.prompt, "chosen": problem.answer, "rejected": answer.strip(), **UNSAFE}
            for problem, answer in zip(problems, answers, strict=True)
            if answer.strip() not in ("", problem.answer)
        ]
        if len(rows) >= n_pairs:
            break
    return datasets.Dataset.from_list(rows[:n_pairs])


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """GRPO's reward: 1 for the right answer and nothing else, 0 otherwise."""
    return [float(completion == wanted) for completion, wanted in zip(completions, answer, strict=True)]


def configuration(name: str, loss: Any, settings: Settings, seed: int, folder: str) -> TrainingArguments:
    """The config of one trainer; TRL's defaults for precision and checkpointing are for larger models."""
    return CONFIGS[name](
        output_dir=folder,
        loss_function=loss,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        logging_steps=settings.logging_steps,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,  # the default follows the log level, which `quiet` lowers
        **settings.extra,
    )


def dpo_trainer(task: Task, config: CustomDPOConfig) -> Trainer:
    """DPO on pairs of the true and the model's own wrong answer."""
    model = task.new_model()
    n_pairs = config.max_steps * config.per_device_train_batch_size
    return CustomDPOTrainer(
        model=model,
        ref_model=None if task.peft_config else task.new_model(),  # with adapters, TRL switches them off instead
        args=config,
        train_dataset=preference_pairs(task, model, n_pairs),
        processing_class=task.tokenizer,
        peft_config=task.peft_config,
    )


def grpo_trainer(task: Task, config: CustomGRPOConfig) -> Trainer:
    """GRPO on sampled answers, rewarded when they match exactly."""
    config.max_completion_length = task.max_new_tokens
    # `answer` is for the reward, `target` for losses that look at a reference answer.
    problems = [{"prompt": p.prompt, "answer": p.answer, "target": p.answer} for p in task.split.train]
    return CustomGRPOTrainer(
        model=task.new_model(),
        reward_funcs=exact_match,
        args=config,
        train_dataset=datasets.Dataset.from_list(problems),
        processing_class=task.tokenizer,
        peft_config=task.peft_config,
    )


CONFIGS = {"dpo": CustomDPOConfig, "grpo": CustomGRPOConfig}
TRAINERS = {"dpo": dpo_trainer, "grpo": grpo_trainer}


def train(
    name: str,
    task: Task,
    loss: Any,
    settings: Settings,
    seed: int,
    before: float,
    *,
    progress: bool = True,
    report: Path | None = None,
) -> Outcome:
    """Train a fresh copy of the base model with one trainer and measure it on the held-out problems; with `report`, the
    folder for pictures of the run."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[name](task, configuration(name, loss, settings, seed, folder))
        trainer.remove_callback(ProgressCallback)
        if progress:
            trainer.add_callback(LabelledProgress(name.upper()))
        if report is not None:
            trainer.add_callback(GradientMonitorCallback(every=min(_MONITORED, settings.steps), layers=True))
            trainer.add_callback(RunReportCallback(report, title=f"Quick start: {name.upper()}"))
        trainer.train()
    seconds = time.perf_counter() - started
    return Outcome(
        trainer=name.upper(),
        loss=loss,
        seed=seed,
        before=before,
        after=solved(trainer.model, task),
        seconds=seconds,
        log=[entry for entry in trainer.state.log_history if "loss" in entry],
    )


def make_task(arguments: argparse.Namespace, seed: int) -> Task:
    """The task and base model that the command line asks for."""
    if arguments.model == "smollm2":
        from smollm2_task import smollm2_task  # needs a package that only this choice installs

        return smollm2_task(seed)
    config = FAST_PRETRAINING if arguments.fast else PretrainConfig()
    return addition_task(config, seed, arguments.cache_dir)


def trainer_settings(arguments: argparse.Namespace, name: str) -> Settings:
    """Settings of one trainer, cut down to two small steps by `--fast`."""
    settings = SETTINGS[arguments.model][name]
    return replace(settings, steps=2, batch_size=16, logging_steps=1) if arguments.fast else settings


def loss_of(arguments: argparse.Namespace, name: str) -> Any:
    """The loss that one trainer is to use."""
    return getattr(arguments, f"{name}_loss")


def report_folder(arguments: argparse.Namespace, name: str) -> Path:
    """Where the pictures of one trainer's run go; of the first seed's, if there are several."""
    return arguments.output_dir / name / "report"


def run_seed(arguments: argparse.Namespace, seed: int) -> list[Outcome]:
    """One base model, then each trainer from that same model."""
    task = make_task(arguments, seed)
    before = solved(task.new_model(), task)
    print(f"seed {seed}: the base model solves {before:.1%} of {len(task.split.held_out)} held-out problems")
    return [
        train(
            name,
            task,
            loss_of(arguments, name),
            trainer_settings(arguments, name),
            seed,
            before,
            report=report_folder(arguments, name) if seed == arguments.seeds[0] else None,
        )
        for name in arguments.trainers
    ]


def quiet() -> None:
    """Leave the terminal to the progress bars and the table; errors are still shown."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SETTINGS), default="tiny", help="base model (default: tiny)")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run for each (default: 0)")
    parser.add_argument("--dpo-loss", default=DPO_LOSS, help="a registered name, or JSON")
    parser.add_argument("--grpo-loss", default=GRPO_LOSS, help="a registered name, or JSON")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument(
        "--cache-dir", type=Path, default=cache_root(), help="where base models are kept (default: %(default)s)"
    )
    parser.add_argument("--fast", action="store_true", help="two steps on a toy model: checks that all runs")
    arguments = parser.parse_args(argv)
    try:  # before a base model is trained for nothing
        for name in arguments.trainers:
            configuration(name, loss_of(arguments, name), trainer_settings(arguments, name), seed=0, folder="")
    except LossConfigError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Run the quick start; returns one outcome for each seed and trainer."""
    quiet()
    arguments = parse_arguments(argv)
    if arguments.model == "tiny":
        # The matrices are too small to share: more threads gain little on an idle machine and lose much on a busy
        # one, and with one the result does not depend on the number of cores.
        torch.set_num_threads(1)
    outcomes = [outcome for seed in arguments.seeds for outcome in run_seed(arguments, seed)]
    print_tables(outcomes)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"curves:  {write_figure(outcomes, arguments.output_dir / 'curves.png')}")
    print(f"results: {write_results(outcomes, arguments.output_dir / 'results.json')}")
    for name in arguments.trainers:
        if (page := report_folder(arguments, name) / "report.html").exists():
            print(f"report:  {page}")
    return outcomes


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would split these small batches over all GPUs
    main()
