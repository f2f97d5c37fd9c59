"""The package's exceptions. Every mistake in a configuration is a `LossConfigError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LossConfigError(ValueError):
    """A loss configuration, registration or combination that cannot be honoured.

    Raised when a config or a trainer is constructed, never during training. The message names the field, what
    was expected and what was found.
    """


@contextmanager
def named(where: str) -> Iterator[None]:
    """Let the messages of mistakes found meanwhile begin with the field `where`."""
    try:
        yield
    except LossConfigError as error:
        raise LossConfigError(f"{where}: {error}") from error


class UnknownLossError(LossConfigError, KeyError):
    """No loss of that name is registered. Also a `KeyError`, since `LossFunctionRegistry.get` is a look-up."""

    def __str__(self) -> str:  # `KeyError` would print the repr of the message
        return str(self.args[0]) if self.args else ""


class MissingFieldError(AttributeError):
    """A loss read a field that the trainer did not compute, because the loss did not declare it."""


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite during training."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be resumed from: half-written, damaged, missing, or not the same on every rank."""
