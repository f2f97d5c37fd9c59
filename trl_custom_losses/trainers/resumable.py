"""A trainer that can be killed at any moment and started again with the same command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import UNFINISHED, agree_on_checkpoint, begin, checkpoints_of, delete, finish, rotate, staging


class ResumableTrainer:
    """Mixed into a TRL trainer, in front of it: checkpoints appear whole or not at all.

    Older ones are deleted, and the new one is pushed, once it is in its place and not before.
    """

    _writing_checkpoint = False

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's; the checkpoint is checked before anything is read from it.

        Args:
            resume_from_checkpoint: A folder; True for the newest checkpoint of the output directory; "latest" for the
                same, or a fresh start if there is none, so that one command both starts and resumes a run;
                "latest_intact" also passes over damaged checkpoints, with a warning.
            *args, **kwargs: As for TRL's.

        Raises:
            CheckpointError: The checkpoint is damaged or missing, or ranks see different ones.
        """
        found = agree_on_checkpoint(resume_from_checkpoint, self.args.output_dir, self.accelerator)
        return super().train(found, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Killed between its last checkpoint and its end: the Trainer would take one step too many.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        place = super()._get_output_dir(trial)
        return os.path.join(place, UNFINISHED) if self._writing_checkpoint else place

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing_checkpoint:  # else later, from where the checkpoint will be
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None and Path(best).exists():
            for folder in checkpoints_of(Path(self._get_output_dir(trial))):
                if not folder.samefile(best):
                    delete(folder)  # which the Trainer would do piece by piece
        return super()._finalize_training(trial, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()  # no rank writes into a folder that is being cleared
        best = self.state.best_model_checkpoint
        self._writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_checkpoint = False
        if self.state.best_global_step:  # the Trainer looked for the best one where it wrote
            place = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(place) if place == folder or place.is_dir() else best
            if self.args.should_save:
                self.state.save_to_json(str(staging(folder) / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish(folder)
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # no rank looks for the checkpoint before it is there
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
