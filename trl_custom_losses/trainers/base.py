"""What both custom trainers share: choosing the loss, its columns, its metrics, and stopping on NaN."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import get_config_model_id

from ..base import Loss
from ..errors import LossConfigError, NonFiniteLossError
from ..hyperparameters import suggestion
from .config import build_loss
from .forward import find_backbone
from .metric_buffer import MetricBuffer

logger = logging.getLogger("trl_custom_losses")

#: Prefix of the loss's data-set columns in TRL's input dicts, so that they never meet a model argument.
COLUMN_PREFIX = "loss_column:"


#: What Trainer and TRL log themselves.
_TRAINER_METRICS = frozenset(
    {
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
        "train_loss",
        "train_runtime",
        "total_flos",
        "num_tokens",
        "num_input_tokens_seen",
        "entropy",
        "mean_token_accuracy",
        "logits/chosen",
        "logits/rejected",
        "logps/chosen",
        "logps/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "aux_loss",
        "kl",
        "policy_loss",
        "entropy_coef",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "step_time",
    }
)


class LossFunctionTrainer:
    """Mixed into a TRL trainer, in front of it. Without a loss function every method hands over to TRL.

    Attributes:
        loss_function: The loss in use, or None for TRL's own objective.
    """

    loss_function: Loss | None = None
    _columns: tuple[str, ...] = ()
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
        trainable = [name for name, parameter in loss.named_parameters() if parameter.requires_grad]
        if trainable:
            raise LossConfigError(
                f"the loss '{loss.name}' has trainable parameters ({', '.join(trainable)}), which no optimizer would "
                "train; make them buffers, or set `requires_grad=False`"
            )
        self.loss_function = loss
        self._columns = tuple(loss.columns)
        check_columns(loss, arguments.get("train_dataset"), "train_dataset")
        check_columns(loss, arguments.get("eval_dataset"), "eval_dataset")
        return arguments

    def _set_up_loss(self) -> None:
        """Finish what needs the constructed trainer: device, backbone, metric buffers; announce the loss once."""
        self._buffers = {"train": MetricBuffer(), "eval": MetricBuffer()}
        self._nonfinite: dict[str, Tensor] = {}
        self._backbone_module: nn.Module | None = None
        if self.loss_function is None:
            return
        self.loss_function.to(self.accelerator.device)
        if "pooled_hidden" in self.loss_function.requires:
            self._backbone()
        if self.accelerator.is_main_process:
            logger.info("Loss function:\n%s", describe(self.loss_function))

    def _backbone(self) -> nn.Module | None:
        """The module that yields the last hidden state, if the loss needs it."""
        if "pooled_hidden" not in self.loss_function.requires:
            return None
        if self._backbone_module is None:
            self._backbone_module = find_backbone(self.accelerator.unwrap_model(self.model))
        return self._backbone_module

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
        if self.loss_function is not None and self.control.should_log:
            self._flush_metrics("train")
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        if self.loss_function is not None:
            self._flush_metrics("eval")
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Someone may call `log` on one rank alone, where a collective would wait for ever; only the calls that the
        # Trainer makes on every rank reduce.
        if self.loss_function is not None and (self.accelerator.num_processes == 1 or "train_runtime" in logs):
            self._flush_metrics("train" if self.model.training else "eval")
        super().log(logs, *args, **kwargs)

    def _named(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The loss's metrics; one that would replace a metric of the trainer is logged as `<loss>/<metric>`."""
        return {
            f"{self.loss_function.name}/{name}" if name in _TRAINER_METRICS else name: value
            for name, value in metrics.items()
        }

    # NaN and infinity

    def _stop_on_nonfinite(self, loss: Tensor, metrics: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
        """In training, remember on the device what was not finite; raise before the optimizer moves.

        The flags of an optimizer step's micro-batches are read by the host once, at the last of them.

        Args:
            loss: The micro-batch's loss with everything added to it.
            metrics: The loss's own; those of components, `<name>_loss`, tell which one it was.
            parts: What the loss was made of, by name.
        """
        if not self.model.training or not getattr(self.args, "stop_on_nonfinite_loss", True):
            return
        watched = {"loss": loss} | {
            name: value for name, value in metrics.items() if name.endswith("_loss") and isinstance(value, Tensor)
        }
        watched |= parts
        # A sum is not finite if any of its terms is not.
        flags = ~torch.isfinite(torch.stack([tensor.detach().float().sum() for tensor in watched.values()]))
        names = "\n".join(watched)
        seen = self._nonfinite.get(names)
        self._nonfinite[names] = flags if seen is None else seen | flags
        if not self.accelerator.sync_gradients:
            return
        for names, flags in self._nonfinite.items():
            if bool(flags[0]):
                found = [name for name, bad in zip(names.split("\n"), flags.tolist(), strict=True) if bad]
                self._abandon_step()
                raise NonFiniteLossError(
                    f"the loss '{self.loss_function.name}' is not finite at step {self.state.global_step + 1} (rank "
                    f"{self.accelerator.process_index}). Not finite: {', '.join(found)}. The model was not updated. To "
                    "continue in spite of it, set `stop_on_nonfinite_loss=False`."
                )
        self._nonfinite = {}

    def _abandon_step(self) -> None:
        """Forget the optimizer step under way, so that training can be started again."""
        self._nonfinite = {}
        self._buffers["train"] = MetricBuffer()


def check_columns(loss: Loss, dataset: Any, which: str) -> None:
    """Raise if a data set (map-style, iterable or a dict of them) lacks a column that the loss names."""
    if dataset is None or not loss.columns:
        return
    if isinstance(dataset, dict):
        for name, part in dataset.items():
            check_columns(loss, part, f"{which}[{name!r}]")
        return
    names = dataset.column_names if isinstance(dataset, Dataset) else getattr(dataset, "column_names", None)
    if names is None:
        names = list(next(iter(dataset), {}))
    for column in loss.columns:
        if column not in names:
            raise LossConfigError(
                f"the loss '{loss.name}' needs the column '{column}', which `{which}` lacks"
                f"{suggestion(column, names)}; it has {', '.join(names)}"
            )


def column_values(examples: list[Mapping[str, Any]], column: str) -> Tensor | list[Any]:
    """One column of a list of examples: a tensor if its values are numbers, else the list."""
    try:
        values = [example[column] for example in examples]
    except KeyError as error:
        raise KeyError(
            f"an example lacks the column '{column}' that the loss needs; it has {sorted(examples[0])}"
        ) from error
    if any(value is None for value in values):
        raise ValueError(f"the column '{column}' that the loss needs has an empty value")
    if all(isinstance(value, (bool, int, float)) for value in values):
        return torch.tensor(values, dtype=torch.float32 if any(isinstance(v, float) for v in values) else None)
    return values


def describe(loss: Loss) -> str:
    """The loss and its components with every resolved hyperparameter and where it came from, one a line."""
    lines = []
    for leaf in loss.leaves():
        values = ", ".join(f"{name}={value!r} ({leaf.origins[name]})" for name, value in leaf.hyperparameters().items())
        lines.append(f"  {leaf.name}: {values or 'no hyperparameters'}")
    head = f"  {loss.name}: {loss.extra_repr()}\n" if loss.composite else ""
    return head + "\n".join(lines)


class _FallbackHandler(logging.StreamHandler):
    """Shows the package's messages where the program has not set up logging; otherwise leaves them to it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


if not logger.handlers:
    logger.addHandler(_FallbackHandler())
    logger.setLevel(logging.INFO)
