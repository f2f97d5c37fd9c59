"""Checkpoints that appear whole or not at all, and are checked against a list of their files when read.

A checkpoint is written into a folder apart. Once every file is on the disk, their names and sizes are listed there, and
the folder is renamed to its place. A run that is killed at any moment leaves nothing half-written where a checkpoint is
looked for, by this package or by any other program.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..errors import CheckpointError
from .announce import logger

#: File of a checkpoint: the size in bytes of each other file.
MANIFEST = "checkpoint_files.json"

#: Folder of the output directory in which checkpoints are written. The hub ignores names that begin like this.
UNFINISHED = "_unfinished"

#: Values of `resume_from_checkpoint` beside a path.
LATEST, LATEST_INTACT = "latest", "latest_intact"


def begin(folder: Path) -> None:
    """Make room for the checkpoint `folder`, removing what a killed run has left; nothing finished is touched."""
    recover(folder.parent)
    clear(folder.parent)
    staging(folder).parent.mkdir(parents=True, exist_ok=True)


def finish(folder: Path) -> None:
    """List the files of a checkpoint that all ranks have written, and move it to its place.

    A finished checkpoint of the same step is replaced.
    """
    staged = staging(folder)
    files = [path for path in sorted(staged.rglob("*")) if path.is_file() and path.name != MANIFEST]
    for path in files:
        _to_disk(path)
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    written = staged / f".{MANIFEST}"
    written.write_text(json.dumps({"files": sizes}, indent=1))
    _to_disk(written)
    written.replace(staged / MANIFEST)
    for path in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
        _to_disk(path)
    if folder.exists():
        folder.rename(staged.with_name(f"replaced-{folder.name}"))
    staged.rename(folder)  # killed before this line, `recover` does it
    _to_disk(folder.parent)
    clear(folder.parent)


def delete(folder: Path) -> None:
    """Delete a checkpoint so that it is never there in part."""
    gone = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    gone.parent.mkdir(exist_ok=True)
    folder.rename(gone)
    clear(folder.parent)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints of a run, but neither the last nor the best, until `limit` are left.

    Args:
        run: Folder of the checkpoints.
        limit: `save_total_limit`; None or 0 keeps all.
        best: Path of the best checkpoint.
    """
    if not limit or limit < 0:
        return
    folders = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]
    kept = set(folders[-1:])
    if best is not None and Path(best).exists():
        kept |= {folder for folder in folders if folder.samefile(best)}
    others = [folder for folder in folders if folder not in kept]
    for folder in others[: max(len(folders) - max(limit, len(kept)), 0)]:
        delete(folder)


def recover(output_dir: Path) -> None:
    """Move a checkpoint to its place that was complete when the run was killed."""
    for staged in (output_dir / UNFINISHED).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        place = output_dir / staged.name
        if not (staged / MANIFEST).is_file():
            continue
        if place.exists() and not any((place / name).is_file() for name in (MANIFEST, TRAINER_STATE_NAME)):
            shutil.rmtree(place)  # no checkpoint: made by another program that had announced one
        if not place.exists():
            staged.rename(place)


def clear(output_dir: Path) -> None:
    """Remove what killed runs have left unfinished."""
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)


def staging(folder: Path) -> Path:
    """Where the checkpoint `folder` is written: on the same disk, so that a rename moves it."""
    return folder.parent / UNFINISHED / folder.name


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    One without a list, as TRL's own trainers write, is taken as it is if it has what they write last.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        whole = (folder / TRAINER_STATE_NAME).is_file()
        return (
            None if whole else f"it has neither {MANIFEST} nor {TRAINER_STATE_NAME}, so it was not written to its end"
        )
    try:
        sizes = dict(json.loads(manifest.read_text())["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{manifest} cannot be read ({error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
    return None


def find_checkpoint(wanted: str | os.PathLike[str] | bool | None, output_dir: str) -> str | None:
    """The folder to resume from, or None to start anew.

    Args:
        wanted: A folder; True for the newest checkpoint in `output_dir`; "latest" for the same, or a fresh start if
            there is none; "latest_intact" also passes over damaged ones, with a warning.
        output_dir: Of the run.

    Raises:
        CheckpointError: The checkpoint is damaged, or there is none where one is needed.
        TypeError: `wanted` is none of these.
    """
    if isinstance(wanted, os.PathLike):
        wanted = os.fspath(wanted)
    if isinstance(wanted, str):
        wanted = {"true": True, "false": None}.get(wanted.lower(), wanted)
    if wanted is None or wanted is False:
        return None
    if wanted is not True and not isinstance(wanted, str):
        raise TypeError(
            f"`resume_from_checkpoint` must be a path, True, {LATEST!r} or {LATEST_INTACT!r}; found {wanted!r}"
        )
    if wanted not in (True, LATEST, LATEST_INTACT):
        return str(_checked(Path(wanted)))
    for folder in checkpoints_of(Path(output_dir)):
        if wanted == LATEST_INTACT and (reason := damage(folder)) is not None:
            logger.warning("%s is damaged (%s); passed over", folder, reason)
        else:
            return str(_checked(folder))
    if wanted is True:
        raise CheckpointError(f"there is no checkpoint in {output_dir} to resume from")
    logger.info("No checkpoint in %s; training starts anew", output_dir)
    return None


def agree_on_checkpoint(
    wanted: str | os.PathLike[str] | bool | None, output_dir: str, accelerator: Accelerator
) -> str | None:
    """`find_checkpoint` on every rank; an error on one rank is an error on all, so that none waits for another.

    Raises:
        CheckpointError: As there, or the ranks see different checkpoints.
    """
    if accelerator.is_main_process:
        recover(Path(output_dir))
    accelerator.wait_for_everyone()
    found, problem = None, None
    try:
        found = find_checkpoint(wanted, output_dir)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    outcomes = [(found, problem)] if accelerator.num_processes == 1 else gather_object([(found, problem)])
    problems = [error for _, error in outcomes if error is not None]
    if problems:
        raise CheckpointError(problems[0])
    if len({folder for folder, _ in outcomes}) > 1:
        listed = ", ".join(f"rank {rank}: {folder}" for rank, (folder, _) in enumerate(outcomes))
        raise CheckpointError(
            f"the ranks found different checkpoints to resume from ({listed}); keep `output_dir` on storage that all "
            "machines share"
        )
    return found


def _checked(folder: Path) -> Path:
    """The folder, if its files are whole."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder} to resume from")
    reason = damage(folder)
    if reason is not None:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be resumed from: {reason}. Name another one, or set "
            f"`resume_from_checkpoint: {LATEST_INTACT}` for the newest whole one in the output directory"
        )
    states = (OPTIMIZER_NAME, "latest", "optimizer*", "pytorch_model_fsdp*", "global_step*")
    if not any(next(folder.glob(pattern), None) for pattern in states):
        logger.warning(
            "%s holds no state of the optimizer (`save_only_model`), which starts anew: training does not continue as "
            "if nothing had happened",
            folder,
        )
    return folder


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The checkpoints of a run by step, the last one first."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if output_dir.is_dir() else ():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            steps[folder] = int(match[1])
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, so that a crash of the machine cannot undo them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network disks have it for files
            raise
    finally:
        os.close(descriptor)
