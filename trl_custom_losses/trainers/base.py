"""What both custom trainers share: choosing the loss, its columns, its metrics, and stopping on NaN."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from ..base import Loss
from ..callbacks import LossFunctionCallback, RunReportCallback
from ..callbacks.gradient_monitor import monitored, uses_gradients_up
from ..errors import LossConfigError, NonFiniteLossError
from ..types import Ranks
from .announce import describe, logger, surprises
from .column_scores import fill_columns
from .columns import COLUMN_PREFIX, check_columns
from .config import build_loss, check_parallelism
from .forward import check_dropout, find_backbone
from .fused_head import fitted_head
from .learned import LearnedParametersCallback, add_to_optimizer, check_trainable, learned_parameters
from .loss_state import check_state, read_state, share_state, write_state
from .metric_buffer import MetricBuffer
from .metric_names import apart_from_the_trainers
from .nonfinite import NonFiniteFlags
from .resumable import ResumableTrainer


class LossFunctionTrainer(ResumableTrainer):
    """Mixed into a TRL trainer, in front of it. Without a loss function it trains as TRL's, to the last bit, and
    saves and resumes as with one.

    Attributes:
        loss_function: The loss in use, or None for TRL's own objective.
    """

    loss_function: Loss | None = None
    _columns: tuple[str, ...] = ()
    _within_step = False
    _default_config: type
    _default_suffix: str

    def _choose_loss(self, trl_trainer: type, loss_function: Any, args: tuple, kwargs: Mapping) -> dict[str, Any]:
        """Build the loss, before any model loads; returns TRL's constructor arguments by name."""
        arguments = dict(inspect.signature(trl_trainer.__init__).bind(self, *args, **kwargs).arguments)
        arguments.pop("self")
        config = arguments.get("args")
        configured = getattr(config, "loss_function", None)
        if loss_function is not None and configured is not None:
            raise LossConfigError(
                f"`loss_function` is given twice: to the trainer ({loss_function!r}) and in its config ({configured!r})"
            )
        chosen = configured if loss_function is None else loss_function
        if chosen is None:
            return arguments
        if config is None:  # the same default as TRL's
            model = arguments["model"]
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            config = arguments["args"] = self._default_config(f"{name.split('/')[-1]}-{self._default_suffix}")
        loss = build_loss(chosen, config)
        check_state(loss)
        self.loss_function = loss
        self._columns = tuple(loss.columns)
        for which in ("train_dataset", "eval_dataset"):
            if which in arguments:
                arguments[which] = fill_columns(loss, arguments[which], which)
                check_columns(loss, arguments[which], which)
        return arguments

    def _set_up_loss(self) -> None:
        """Finish what needs the constructed trainer: device, backbone, metric buffers; announce the loss once."""
        device = self.accelerator.device
        self._buffers = {"train": MetricBuffer(device), "eval": MetricBuffer(device)}
        self._nonfinite = NonFiniteFlags()
        self._backbone_module: nn.Module | None = None
        if self.loss_function is None:
            return
        check_parallelism(self.accelerator.parallelism_config)  # a launcher may set it too
        self.loss_function.to(device)
        share_state(self.loss_function, self.accelerator)
        # What the loss keeps in evaluation mode, such as a frozen scorer, stays so.
        self._always_evaluating = [module for module in self.loss_function.modules() if not module.training]
        self._ranks = Ranks(
            index=self.accelerator.process_index,
            count=self.accelerator.num_processes,
            sum=lambda tensor: self.accelerator.reduce(tensor, "sum"),
            gather=lambda tensor: self.accelerator.gather(tensor.detach()),
        )
        self._needs_hidden = bool(
            {"pooled_hidden", "sequence_hidden"} & (self.loss_function.requires | self.loss_function.rollout_requires)
        )
        self._backbone()
        if "second_logits" in self.loss_function.requires:
            check_dropout(self.accelerator.unwrap_model(self.model), self.loss_function.name)
        check_trainable(self.loss_function, self.accelerator, self.lr_scheduler)
        self._check_batch_size()
        self._driver = LossFunctionCallback(
            self.loss_function, self.accelerator, self._log_step, self._raise_if_nonfinite
        )
        self.add_callback(self._driver)
        if learned_parameters(self.loss_function):
            self.add_callback(LearnedParametersCallback(self.loss_function, self.accelerator))
        if self.accelerator.is_main_process:
            logger.info("Loss function:\n%s", describe(self.loss_function))
            for message in surprises(self.loss_function, self.args):
                logger.warning(message)

    def _check_batch_size(self) -> None:
        """Refuse micro-batches too small for a loss that compares pairs or sequences with one another."""
        size = self.args.per_device_train_batch_size * self.accelerator.num_processes
        if size < self.loss_function.minimum_batch:
            raise LossConfigError(
                f"the loss '{self.loss_function.name}' compares at least {self.loss_function.minimum_batch} "
                f"{'pairs' if self.loss_function.family == 'preference' else 'sequences'} of a micro-batch over all "
                f"ranks, found per_device_train_batch_size x processes = {size}"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; see `ResumableTrainer.train` for the checkpoint to resume from."""
        self._nonfinite.clear()  # of a run that was interrupted
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunReportCallback) and self.loss_function is not None:
                callback.loss = inspect.cleandoc(describe(self.loss_function))
        with (
            monitored(self.callback_handler.callbacks, self.loss_function, self.accelerator, self._log_step),
            self._fitted_head(),
        ):
            try:
                return super().train(*args, **kwargs)
            except BaseException as error:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, RunReportCallback):
                        callback.on_abort(self.args, self.state, error)
                raise

    def _fitted_head(self) -> AbstractContextManager[None]:
        if self.loss_function is None:
            return nullcontext()
        return fitted_head(self.accelerator.unwrap_model(self.model))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """TRL's, which also trains what the loss learns."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.loss_function is not None and learned_parameters(self.loss_function):
            add_to_optimizer(self.loss_function, optimizer)
        return optimizer

    def _log_step(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Buffer metrics that are equal on all ranks."""
        named = self._named(metrics)
        self._buffers["train"].add({name: (value, 1.0, "log", "mean") for name, value in named.items()})

    def _loss_in_mode(self) -> Loss:
        """The loss, in the model's mode, so that its state moves in training only."""
        self.loss_function.train(self.model.training)
        for module in self._always_evaluating:
            module.eval()
        return self.loss_function

    def _backbone(self) -> nn.Module | None:
        """The module that yields the last hidden state, if the loss needs it."""
        if not self._needs_hidden:
            return None
        if self._backbone_module is None:
            self._backbone_module = find_backbone(self.accelerator.unwrap_model(self.model))
        return self._backbone_module

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        missing = [column for column in self._columns if column not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *missing]

    def _take_columns(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Remove the loss's columns from the inputs, so that the model never sees them, and return them."""
        return {name: inputs.pop(COLUMN_PREFIX + name) for name in self._columns if COLUMN_PREFIX + name in inputs}

    # Metrics

    def _flush_metrics(self, mode: str) -> None:
        """Reduce the buffered metrics over ranks. A collective: all ranks or none."""
        if self._buffers[mode]:
            self._store_metrics(mode, self._buffers[mode].reduce(self.accelerator.gather))

    def _store_metrics(self, mode: str, reduced: Mapping[str, float]) -> None:
        """Hand reduced metrics to TRL's own store, which its `log` reads."""
        for name, value in reduced.items():
            self._metrics[mode][name] = [value]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.loss_function is not None:
            if self.control.should_log:
                self._flush_metrics("train")
            else:
                self._buffers["train"].compact(self.accelerator.gather)
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's; a data set given here gets the columns that the loss can have made, as those of the constructor."""
        if self.loss_function is not None and not isinstance(eval_dataset, str):
            eval_dataset = fill_columns(self.loss_function, eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._fitted_head():
            output = super().evaluation_loop(*args, **kwargs)
        if self.loss_function is not None:
            self._flush_metrics("eval")
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Someone may call `log` on one rank alone, where a collective would wait for ever. So on several ranks only the
        # calls that the Trainer makes on all of them reduce, and a callback's own call carries no buffered metrics.
        if self.loss_function is not None and (self.accelerator.num_processes == 1 or "train_runtime" in logs):
            self._flush_metrics("train" if self.model.training else "eval")
        super().log(logs, *args, **kwargs)

    def _named(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return apart_from_the_trainers(metrics, self.loss_function.name)

    # State

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's; a checkpoint also gets the loss's buffers, before it is pushed anywhere."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        checkpoint = _internal_call and folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.loss_function is not None and self.args.should_save and checkpoint:
            write_state(self.loss_function, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.loss_function is not None:
            read_state(self.loss_function, Path(checkpoint))

    # NaN and infinity

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's; with the last micro-batch of an optimizer step, ranks exchange what its losses observed."""
        self._within_step = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._within_step = False

    def _end_micro_batch(self, loss: Tensor, metrics: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
        """In training, remember on the device what was not finite; with the last micro-batch, tell the other ranks.

        Nothing waits here. What the ranks exchange travels during backward, and is read before the optimizer moves.

        Args:
            loss: The micro-batch's loss with everything added to it.
            metrics: The loss's own; those of components, `<name>_loss`, tell which one it was.
            parts: What the loss was made of, by name.
        """
        if not self.model.training:
            return
        watching = getattr(self.args, "stop_on_nonfinite_loss", True)
        # Someone may call `compute_loss` by hand, on one rank alone: that is not part of the step under way.
        flags = self._nonfinite if self._within_step else NonFiniteFlags()
        if watching:
            flags.look(loss, metrics, parts)
        if not self._within_step:
            if watching and flags.alarm():
                raise self._not_finite(flags.found())
        elif self.accelerator.sync_gradients:
            self._driver.exchange(flags.alarm() if watching else None)
            if self._moves_in_backward():
                self._raise_if_nonfinite()

    def _moves_in_backward(self) -> bool:
        """Whether the model moves within the backward pass, so that it is too late to stop after it.

        A gradient scaler counts too: stopped between its own steps, it would have to be set back.
        """
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return True
        if uses_gradients_up(self.args.optim):
            return True
        # An optimizer of the user's own may step in such hooks.
        return any(parameter._post_accumulate_grad_hooks for parameter in self.model.parameters())

    def _raise_if_nonfinite(self) -> None:
        """Stop, on all ranks, if the loss was not finite on any."""
        if not self._driver.alarmed():
            self._nonfinite.clear()
            return
        found = self._nonfinite.found()
        self._abandon_step()
        raise self._not_finite(found or ["the loss of another rank"])

    def _not_finite(self, found: Sequence[str]) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"the loss '{self.loss_function.name}' is not finite at step {self.state.global_step + 1} (rank "
            f"{self.accelerator.process_index}). Not finite: {', '.join(found)}. The model was not updated. To "
            f"continue in spite of it, set `stop_on_nonfinite_loss=False` in a {self._default_config.__name__}."
        )

    def _abandon_step(self) -> None:
        """Forget the optimizer step under way, so that training can be started again."""
        self._nonfinite.clear()
        self._driver.forget()
        self._buffers["train"] = MetricBuffer(self.accelerator.device)
