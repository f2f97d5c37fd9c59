"""What a user mistyped, found before a config is built, which may refuse the machine first."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import DPOConfig, TrlParser

from ..errors import LossConfigError
from ..hyperparameters import suggestion
from ..registry import LossFunctionRegistry
from .announce import logger
from .config import parse_loss_function

_NO_GPU = "On a machine without a GPU: --bf16 false --use_cpu true"


class ArgumentParser(TrlParser):
    """TRL's parser, whose mistakes are one line."""

    def __init__(self, types: Sequence[type], prog: str | None = None) -> None:
        super().__init__(types, prog=prog)
        self._config_type = next(type_ for type_ in types if issubclass(type_, TrainingArguments))
        self._known = {declared.name for type_ in types for declared in dataclasses.fields(type_) if declared.init}
        self._file: Path | None = None
        self._values: dict[str, Any] = {}

    def read(self, words: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses of the words of a command line and of the file that they name.

        Raises:
            LossConfigError: The file cannot be read, an argument is misspelt, or a value is refused.
            SystemExit: argparse refuses the words (code 2), or printed the help.
        """
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if words.count("--config") > 1:
            self.error("--config is given twice")
        if "--config" in words:
            self._check_file(words)
        try:
            *parsed, _ = self.parse_args_and_config(words, return_remaining_strings=True)
        except LossConfigError:
            raise
        except ValueError as error:  # of a value, or of a machine that cannot do what the defaults ask for
            self._check_loss()
            hint = f" {_NO_GPU}" if "bf16" in str(error) else ""
            raise LossConfigError(f"{error}{hint}") from error
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        """End the program without the usage, which is hundreds of lines."""
        self.exit(2, f"error: {' '.join(message.split())}; all arguments: {self.prog} --help\n")

    def parse_known_args(  # type: ignore[override] # TRL calls it by these names
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse; the last step before the configs are built."""
        if not args and self._file is None:
            self.error("no arguments; give at least --config FILE.yaml, or --model_name_or_path and --dataset_name")
        found, unknown = super().parse_known_args(args, namespace)
        self._values = dict(vars(found))
        if unknown and not unknown[0].startswith("-"):  # not the value of a flag that is unknown
            hint = f"; did you mean --config {unknown[0]}?" if unknown[0].endswith((".yaml", ".yml")) else ""
            raise LossConfigError(f"unexpected word {unknown[0]!r}{hint}")
        names = [word.lstrip("-").split("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
        for name in names:
            if difflib.get_close_matches(name, self._known, n=1, cutoff=0.85):
                raise LossConfigError(f"unknown argument '{name}'{suggestion(name, self._known)}")
        if names:  # launchers add some
            logger.warning("Ignored arguments that no config knows: %s", ", ".join(names))
        return found, unknown

    def _check_file(self, words: Sequence[str]) -> None:
        """Refuse a file that is missing or malformed, and keys that no config has."""
        following = words[words.index("--config") + 1 :]
        if not following:
            self.error("--config needs a file")
        self._file = Path(following[0])
        where = f"`--config` {self._file}"
        try:
            settings = yaml.safe_load(self._file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:  # malformed, or a tag that would make Python objects
            raise LossConfigError(f"the file given as `--config` is not plain YAML: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise LossConfigError(f"{where}: {reason}") from error
        if not isinstance(settings, dict):
            raise LossConfigError(f"{where}: expected keys with values, found {type(settings).__name__}")
        for key in settings:
            if key != "env" and key not in self._known:
                raise LossConfigError(f"{where}: unknown key {key!r}{suggestion(key, self._known)}")

    def _check_loss(self) -> None:
        """Refuse a `loss_function` that cannot be built, with what else was given."""
        loss = parse_loss_function(self._values.get("loss_function"))
        if loss is not None:
            own, general = (
                {declared.name for declared in dataclasses.fields(type_) if declared.init}
                for type_ in (self._config_type, TrainingArguments)
            )
            LossFunctionRegistry.build(
                loss,
                family="preference" if issubclass(self._config_type, DPOConfig) else "policy",
                defaults={name: self._values[name] for name in own - general},
            )
