"""A trainer that can be killed at any moment and started again with the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .checkpoints import agree_on_checkpoint, begin, finish


class ResumableTrainer:
    """Mixed into a TRL trainer, in front of it: checkpoints are whole or are not taken for checkpoints.

    Older checkpoints are deleted once the new one is finished, and not before.
    """

    _writing_checkpoint = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's; the checkpoint is checked before anything is read from it.

        Args:
            resume_from_checkpoint: A folder; True for the newest finished checkpoint of the output directory; "latest"
                for the same, or a fresh start if there is none, so that one command both starts and resumes a run;
                "latest_intact" also passes over damaged checkpoints, with a warning.
            *args, **kwargs: As for TRL's.

        Raises:
            CheckpointError: The checkpoint is not finished, damaged or missing, or ranks see different ones.
        """
        found = agree_on_checkpoint(resume_from_checkpoint, self.args.output_dir, self.accelerator)
        return super().train(found, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Killed between its last checkpoint and its end: the Trainer would take one step too many.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._writing_checkpoint:  # after the arguments were saved, which state the limit
            self.args.save_total_limit = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit = self.args.save_total_limit
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()  # no rank writes into a folder that is being cleared
        self._writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_checkpoint = False
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish(folder)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
