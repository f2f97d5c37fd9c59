"""Checkpoints that count only once they are whole: listed when finished, and checked against that list when read.

While a checkpoint is written a mark stands beside its folder. Once every file is on the disk, their names and sizes are
listed in the folder, the list is renamed into place and the mark goes. A run that is killed at any moment leaves either
a finished checkpoint or one that is known not to be.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import CheckpointError
from .announce import logger

#: File of a finished checkpoint: the size in bytes of each other file.
MANIFEST = "checkpoint_files.json"

#: Values of `resume_from_checkpoint` beside a path.
LATEST, LATEST_INTACT = "latest", "latest_intact"


def begin(folder: Path) -> None:
    """Mark a checkpoint as unfinished, and remove what an earlier run has left in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _mark(folder).touch()
    if folder.exists():
        shutil.rmtree(folder)


def finish(folder: Path) -> None:
    """List the files of a checkpoint that all ranks have written, and take its mark away."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    for path in files:
        _to_disk(path)
    written = folder / f".{MANIFEST}"
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    written.write_text(json.dumps({"files": sizes}, indent=1))
    _to_disk(written)
    written.replace(folder / MANIFEST)
    _mark(folder).unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint was written to its end; the Trainer's state is the last file that is always there."""
    return not _mark(folder).exists() and (folder / TRAINER_STATE_NAME).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with a finished checkpoint's files, or None.

    A checkpoint without a list, as TRL's own trainers write, is taken as it is.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        sizes = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return f"{manifest} cannot be read ({error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
    return None


def find_checkpoint(wanted: str | bool | None, output_dir: str) -> str | None:
    """The folder to resume from, or None to start anew.

    Args:
        wanted: A folder; True for the newest finished checkpoint in `output_dir`; "latest" for the same, or a fresh
            start if there is none; "latest_intact" also passes over damaged ones, with a warning.
        output_dir: Of the run.

    Raises:
        CheckpointError: The checkpoint is not finished or is damaged, or there is none where one is needed.
    """
    wanted = {"true": True, "false": None}.get(wanted.lower(), wanted) if isinstance(wanted, str) else wanted
    if wanted is None or wanted is False:
        return None
    if isinstance(wanted, str) and wanted not in (LATEST, LATEST_INTACT):
        return str(_checked(Path(wanted)))
    for folder in _newest_first(Path(output_dir)):
        if not is_finished(folder):
            logger.warning("%s was not written to its end; passed over", folder)
        elif wanted == LATEST_INTACT and (reason := damage(folder)) is not None:
            logger.warning("%s is damaged (%s); passed over", folder, reason)
        else:
            return str(_checked(folder))
    if wanted is True:
        raise CheckpointError(f"there is no finished checkpoint in {output_dir} to resume from")
    logger.info("No checkpoint in %s; training starts anew", output_dir)
    return None


def agree_on_checkpoint(wanted: str | bool | None, output_dir: str, accelerator: Accelerator) -> str | None:
    """`find_checkpoint` on every rank; an error on one rank is an error on all, so that none waits for another.

    Raises:
        CheckpointError: As there, or the ranks see different checkpoints.
    """
    found, problem = None, None
    try:
        found = find_checkpoint(wanted, output_dir)
    except CheckpointError as error:
        problem = str(error)
    outcomes = [(found, problem)] if accelerator.num_processes == 1 else gather_object([(found, problem)])
    problems = [error for _, error in outcomes if error is not None]
    if problems:
        raise CheckpointError(problems[0])
    if len({folder for folder, _ in outcomes}) > 1:
        listed = ", ".join(f"rank {rank}: {folder}" for rank, (folder, _) in enumerate(outcomes))
        raise CheckpointError(
            f"the ranks found different checkpoints to resume from ({listed}); keep `output_dir` on storage that all "
            "nodes share, or set `save_on_each_node=True`"
        )
    return found


def _checked(folder: Path) -> Path:
    """The folder, if its files are whole."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder} to resume from")
    reason = damage(folder) if is_finished(folder) else "it was not written to its end"
    if reason is not None:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be resumed from: {reason}. Name another one, or set "
            f"`resume_from_checkpoint: {LATEST_INTACT}` for the newest whole one in the output directory"
        )
    return folder


def _newest_first(output_dir: Path) -> list[Path]:
    """The checkpoints of a run by step, the last one first."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if output_dir.is_dir() else ():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            steps[folder] = int(match[1])
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _mark(folder: Path) -> Path:
    """Beside the folder, so that what is uploaded or copied from it does not carry the mark."""
    return folder.parent / f".{folder.name}.unfinished"


def _to_disk(path: Path) -> None:
    """Wait until a file is on the disk, so that a crash of the machine cannot undo it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
