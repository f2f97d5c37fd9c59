"""Kill a training run again and again, at random moments, and see that it ends as if nothing had happened.

    python scripts/kill_and_resume.py --kills 20
    python scripts/kill_and_resume.py --kills 20 --trainer grpo
    python scripts/kill_and_resume.py --kills 20 --processes 2

A tiny random model is trained with a loss that has a state (weights that balance themselves), and saves a checkpoint
after every step. One run is left alone. The other is started with the same command every time, with
`--resume_from_checkpoint latest`, and gets SIGKILL, all its processes at once: every third time at a random moment of
the whole life of the process (most often while it starts, or reads a checkpoint), otherwise a random time after its
first new step began to be saved (while it writes a checkpoint, deletes an old one, computes). Then weights, optimizer,
the loss's state and the logged losses of the two runs are compared bit by bit. The data last for a few steps only, so
that the runs go through many epochs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
OBJECTIVES = {
    "dpo": {"pref": {"type": "sigmoid"}, "sft": {"type": "sft"}},
    "grpo": {"clipped": {"type": "grpo"}, "plain": {"type": "dapo"}},
}


#: Steps that one start of the run may add before it is killed.
MOST_STEPS = 3


@dataclass(frozen=True)
class Kill:
    """One interruption.

    Args:
        number: Counted from 1.
        seconds: Since the process was started.
        step: Last step with a checkpoint when the run was killed.
        progress: Steps with a checkpoint that this start added.
        unfinished: Steps whose checkpoint was being written.
    """

    number: int
    seconds: float
    step: int
    progress: int
    unfinished: list[int]


def digits_reward(completions: list[str], **columns: Any) -> list[float]:
    """Share of the completion that is digits above 4, so that a random model's answers differ in reward."""
    return [sum(character in "56789" for character in text) / max(len(text), 1) for text in completions]


def make_inputs(trainer: str, folder: Path, seed: int) -> tuple[Path, Path]:
    """Write a tiny random model with its tokenizer and a data set; returns both paths."""
    from addition_task import PretrainConfig, addition_problem, build_model, make_tokenizer

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = build_model(PretrainConfig(hidden_size=32, num_layers=2, num_heads=2), tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    generator = random.Random(seed)
    rows = []
    for _ in range(16):
        problem = addition_problem(generator.randrange(100), generator.randrange(100))
        wrong = f"{(int(problem.answer) + generator.randrange(1, 50)) % 1000:03d}"
        rows.append(
            {"prompt": problem.prompt} | ({"chosen": problem.answer, "rejected": wrong} if trainer == "dpo" else {})
        )
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "model", data


def training_command(
    trainer: str, model: Path, data: Path, output: Path, steps: int, processes: int, seed: int
) -> list[str]:
    """The one command that starts and resumes a run."""
    objectives = OBJECTIVES[trainer]
    loss = {"type": "dynamic_multi_objective", "rule": "dwa", "window": 1, "objectives": objectives}
    options: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "loss_function": json.dumps(loss),
        "output_dir": output,
        "resume_from_checkpoint": "latest",
        "max_steps": steps,
        "save_steps": 1,
        "save_total_limit": 2,
        "per_device_train_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if trainer == "grpo":
        options |= {
            "num_generations": 4,
            "max_completion_length": 4,
            "reward_funcs": "scripts.kill_and_resume:digits_reward",
        }
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [*program, str(ROOT / "scripts" / f"train_{trainer}.py"), *words]


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def kill_all(run: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the run and all its processes at once; a launcher puts its own into sessions of their own."""
    run.send_signal(signal.SIGSTOP)  # so that a launcher starts no further one meanwhile
    processes = psutil.Process(run.pid).children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.kill()
    run.wait()
    psutil.wait_procs(processes)


def finished_steps(output: Path) -> list[int]:
    """Steps with a checkpoint."""
    return sorted(int(path.parent.name.split("-")[1]) for path in output.glob("checkpoint-*/checkpoint_files.json"))


def unfinished_steps(output: Path, since: float = 0.0) -> list[int]:
    """Steps whose checkpoint is being written, in a folder made after `since` (seconds of the epoch)."""
    folders = [path for path in output.glob("_unfinished/checkpoint-*") if _changed(path) > since]
    return sorted(int(path.name.split("-")[1]) for path in folders)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # gone since it was listed
        return 0.0


def wait_for_step(run: subprocess.Popen[bytes], output: Path, after: int) -> bool:
    """Wait until the run begins to save a step beyond `after`; False if it ended instead."""
    began = time.time()  # what an earlier, killed run has left is older
    while run.poll() is None:
        if any(step > after for step in (*unfinished_steps(output, began), *finished_steps(output))):
            return True
        time.sleep(0.005)
    return False


def interrupt(command: Sequence[str], output: Path, log: Path, number: int, delay: float, *, stepping: bool) -> Kill:
    """Start the run, wait, and kill it.

    Args:
        command: Of the run.
        output: Its output directory.
        log: Where its output goes.
        number: Of the kill.
        delay: Seconds to wait.
        stepping: Whether they count from when a new step began to be saved, or from the start of the process.

    Raises:
        SystemExit: The run ended by itself: it failed, or there are too few steps for so many kills.
    """
    before, began, launched = max(finished_steps(output), default=0), time.monotonic(), time.time()
    run = start(command, log)
    if not stepping or wait_for_step(run, output, before):
        end = time.monotonic() + delay
        # A start that is faster than the first one was must not use up the steps that are left for the other kills.
        while time.monotonic() < end and max(finished_steps(output), default=0) < before + MOST_STEPS:
            time.sleep(0.005)
    if run.poll() is not None:
        tail = log.read_text()[-3000:]
        raise SystemExit(f"the run ended by itself (exit status {run.poll()}) before kill {number}:\n{tail}")
    kill_all(run)
    step = max(finished_steps(output), default=0)
    return Kill(number, time.monotonic() - began, step, step - before, unfinished_steps(output, launched))


def finish(command: Sequence[str], log: Path) -> None:
    """Let the run come to its end.

    Raises:
        SystemExit: It failed.
    """
    if start(command, log).wait() != 0:
        raise SystemExit(f"the run failed:\n{log.read_text()[-3000:]}")


# Not the training's: a clock, and TRL's count of tokens, which starts again at zero.
UNCOMPARED = ("step_time", "num_tokens")


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What differs between the ends of two runs; empty if nothing does."""
    found = []
    for name in ("model.safetensors", f"checkpoint-{steps}/loss_function.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        found += [f"{name}: {key}" for key in ours.keys() | theirs.keys() if not _equal(ours.get(key), theirs.get(key))]
    name = f"checkpoint-{steps}/optimizer.pt"
    moments = [torch.load(path / name, weights_only=True)["state"] for path in (one, other)]
    for parameter, state in moments[0].items():
        other_state = moments[1].get(parameter, {})
        found += [f"{name}: {key} of {parameter}" for key in state if not _equal(state[key], other_state.get(key))]
    logs = [
        json.loads((path / f"checkpoint-{steps}/trainer_state.json").read_text())["log_history"]
        for path in (one, other)
    ]
    for ours, theirs in zip(*logs, strict=True):
        names = (ours.keys() | theirs.keys()).difference(UNCOMPARED)
        found += [f"logged {name} of step {ours['step']}" for name in names if ours.get(name) != theirs.get(name)]
    return found


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both trainings, print what happened and write it to `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trainer", choices=sorted(OBJECTIVES), default="dpo")
    parser.add_argument("--processes", type=int, default=1, help="more than one: DDP")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data, the training and the moments")
    parser.add_argument("--output", type=Path, default=Path("outputs/kill_and_resume"))
    parsed = parser.parse_args(arguments)
    folder = (parsed.output / f"{parsed.trainer}-{parsed.processes}").absolute()
    folder.mkdir(parents=True, exist_ok=False)
    steps = (MOST_STEPS + 1) * parsed.kills
    model, data = make_inputs(parsed.trainer, folder, parsed.seed)

    def command(output: Path) -> list[str]:
        return training_command(parsed.trainer, model, data, output, steps, parsed.processes, parsed.seed)

    alone, killed, log = folder / "alone", folder / "killed", folder / "killed.log"
    print(f"{parsed.trainer}, {parsed.processes} process(es), {steps} steps", flush=True)
    launched = time.monotonic()
    run = start(command(alone), folder / "alone.log")
    wait_for_step(run, alone, 0)
    began = time.monotonic()
    wait_for_step(run, alone, steps - 1)
    step_time = (time.monotonic() - began) / (steps - 1)
    if run.wait() != 0:
        raise SystemExit(f"the uninterrupted run failed:\n{(folder / 'alone.log').read_text()[-3000:]}")
    print(f"uninterrupted: {step_time:.2f} s a step with its checkpoint", flush=True)

    moments = random.Random(parsed.seed)
    kills = []
    for number in range(1, parsed.kills + 1):
        stepping = number % 3 != 1
        delay = moments.uniform(0, 3 * step_time if stepping else began - launched + 3 * step_time)
        kills.append(interrupt(command(killed), killed, log, number, delay, stepping=stepping))
        kill = kills[-1]
        writing = f", while writing that of step {kill.unfinished[-1]}" if kill.unfinished else ""
        print(f"kill {number:3d} after {kill.seconds:4.1f} s: last checkpoint at step {kill.step}{writing}", flush=True)
    finish(command(killed), log)
    found = differences(alone, killed, steps)
    writing = sum(bool(kill.unfinished) for kill in kills)
    early = sum(kill.progress == 0 and not kill.unfinished for kill in kills)
    verdict = (
        "the same, bit for bit" if not found else f"DIFFERENT in {len(found)} places, such as {', '.join(found[:5])}"
    )
    print(
        f"{len(kills)} kills, {early} of them before anything new was saved, {writing} while a checkpoint was written. "
        f"Weights, optimizer, state and logs: {verdict}"
    )
    results = {"settings": {**vars(parsed), "output": str(parsed.output)}, "steps": steps, "different": found}
    results |= {"kills": [asdict(kill) for kill in kills], "seconds_per_step": step_time, "torch": torch.__version__}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    sys.exit(1 if main()["different"] else 0)
