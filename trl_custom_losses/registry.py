"""The registry: one dict from name to loss, the only way from a configuration to a loss object."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .adapters import as_loss_class, check_facts, check_readable, facts_of, import_loss
from .base import Loss, LossFunction
from .errors import LossConfigError, UnknownLossError
from .foreign import ObjectLoss
from .hyperparameters import resolve, suggestion
from .scheduling import put_schedules, take_schedules
from .types import REQUIREMENTS, Family

ENTRY_POINT_GROUP = "trl_custom_losses.losses"

#: Origin of the hyperparameters of a loss that was handed over as an object.
GIVEN_OBJECT = "the given object"


@dataclass(frozen=True)
class BuildContext:
    """What a loss is built for.

    Args:
        family: The trainer's family; None accepts any.
        defaults: Fields of the trainer's config that losses of `family` fall back to.
        defaults_from: The config's name, for messages.
        untouched: Fields that still have the config's own default, for messages.
    """

    family: Family | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    defaults_from: str = "trainer config"
    untouched: frozenset[str] = frozenset()


class LossFunctionRegistry:
    """Names of losses. `register` adds one, `get` looks one up, `build` makes a loss from a configuration."""

    _functions: ClassVar[dict[str, type[Loss]]] = {}
    _loaded: ClassVar[bool] = False

    @classmethod
    def register(cls, name: str, **facts: Any) -> Callable[[Any], Any]:
        """Decorator that registers a loss class or a function `f(batch, outputs, *, beta=0.1)` under `name`.

        Args:
            name: The name used as `type` in configurations.
            **facts: Class attributes of `Loss` for a function: `family` ("preference" or "policy"; may be left out
                if the first argument is annotated `PreferenceBatch` or `PolicyBatch`), `requires`, `columns`,
                `reduction`, ...

        Raises:
            LossConfigError: The name is taken or malformed, the object is no loss, or a fact is unknown.
        """

        def decorator(loss: Any) -> Any:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
                raise LossConfigError(f"a loss is registered under a name such as 'my_loss', found {name!r}")
            if name not in cls._functions and not cls._loaded and not _is_builtin(loss):
                cls._load()  # so that a clash with a name of this package shows at once
            if name in cls._functions and not _is_run_again(cls._functions[name], loss):
                raise LossConfigError(
                    f"a loss named '{name}' is already registered ({_where(cls._functions[name])}); choose another "
                    f"name for {_where(loss)}"
                )
            cls._functions[name] = as_loss_class(loss, facts, name)
            return loss

        return decorator

    @classmethod
    def get(cls, name: str) -> type[Loss]:
        """The loss class registered under `name` or named by an import path `package.module:attribute`.

        Raises:
            UnknownLossError: Nothing has that name.
            LossConfigError: The import path fails.
        """
        return cls.find(name, family=None)

    @classmethod
    def names(cls, family: Family | None = None) -> list[str]:
        """Sorted names of the registered losses, of one family or of all; family-neutral compositions are in each."""
        cls._load()
        if family not in (None, *REQUIREMENTS):
            raise LossConfigError(f"a family is 'preference' or 'policy', found {family!r}")
        return sorted(name for name, loss in cls._functions.items() if family is None or loss.family in (family, None))

    @classmethod
    def name_of(cls, loss_class: type) -> str:
        """The name that a class is registered under, or else its own."""
        cls._load()
        names = (name for name, registered in cls._functions.items() if registered is loss_class)
        return next(names, loss_class.__name__)

    @classmethod
    def build(
        cls,
        config: str | Mapping[str, Any] | LossFunction,
        *,
        family: Family | None = None,
        defaults: Mapping[str, Any] | None = None,
        context: BuildContext | None = None,
    ) -> Loss:
        """Make the loss that `config` describes.

        Args:
            config: A name, `{"type": name, **hyperparameters}`, a loss object or a plain function.
            family: The trainer's family.
            defaults: Values for hyperparameters that `config` leaves out, such as the trainer's config fields.
            context: Both of these at once.

        Raises:
            LossConfigError: The name is unknown, of another family, or a hyperparameter is unknown, missing, ill-typed
                or out of range.
        """
        check_readable(config)
        context = context or BuildContext(family=family, defaults=defaults or {})
        if isinstance(config, (str, Mapping)):
            loss = cls._from_config(config, context)
        else:
            loss = _from_object(config, context)
        check_facts(loss)
        if context.family is not None and loss.family != context.family:
            raise _wrong_family(loss.name, loss.family, context.family)
        return loss

    @classmethod
    def _from_config(cls, config: str | Mapping[str, Any], context: BuildContext) -> Loss:
        settings = {"type": config} if isinstance(config, str) else dict(config)
        if "type" not in settings:
            raise LossConfigError(f"`loss_function` needs a 'type', found only {sorted(map(str, settings))}")
        type_ = settings.pop("type")
        if not isinstance(type_, str):
            raise LossConfigError(f"`loss_function.type` is a name, found {type_!r} ({type(type_).__name__})")
        if not all(isinstance(key, str) for key in settings):
            raise LossConfigError(f"loss '{type_}': hyperparameter names are text, found {list(settings)}")
        return cls.build_class(cls.find(type_, context.family), settings, name=type_, context=context)

    @classmethod
    def build_class(
        cls, loss_class: type[Loss], settings: Mapping[str, Any], *, name: str, context: BuildContext
    ) -> Loss:
        """Make a loss of a class, registered or not, as from a configuration.

        Args:
            loss_class: As `get` returns them.
            settings: Hyperparameters, schedules among them.
            name: What the loss is called.
            context: What it is built for.

        Raises:
            LossConfigError: See `build`.
        """
        if loss_class.family is not None and context.family not in (None, loss_class.family):
            raise _wrong_family(name, loss_class.family, context.family)
        declared = loss_class.declared_hyperparameters()
        # Fields of the trainer's config mean what they say within its own family only.
        own = context.family is not None and loss_class.family == context.family
        defaults = context.defaults if own else {}
        settings = _without_aliases(name, loss_class, settings)
        settings, schedules = take_schedules(name, declared, settings)
        values, origins = resolve(name, declared, settings, defaults, context.defaults_from, context.untouched)
        try:
            loss = loss_class.from_hyperparameters(values, context)
            put_schedules(loss, schedules, lambda changed: loss_class.from_hyperparameters(values | changed, context))
        except LossConfigError as error:
            raise LossConfigError(f"loss '{name}': {error}") from error
        except Exception as error:  # whatever the constructor of somebody's loss raises
            raise LossConfigError(
                f"loss '{name}' rejected its hyperparameters {values}: {type(error).__name__}: {error}"
            ) from error
        loss.name, loss.origins = name, origins
        return loss

    @classmethod
    def find(cls, name: str, family: Family | None) -> type[Loss]:
        """As `get`; a function that does not say its family is taken to be of `family`."""
        if name in cls._functions:
            return cls._functions[name]
        cls._load()
        if name in cls._functions:
            return cls._functions[name]
        if ":" in str(name):
            return cls.class_of(import_loss(name), family, name)
        raise UnknownLossError(
            f"there is no loss named {name!r}{suggestion(str(name), cls._functions)}. Registered: "
            f"{', '.join(cls.names(family))}. A loss of your own is named by its import path, 'package.module:Loss'."
        )

    @staticmethod
    def with_example(loss_class: type[Loss], given: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Hyperparameters to show a loss with: those given, under their own names, and those of its `example` where
        none are given or one without a default is missing.

        Args:
            loss_class: As `get` returns them.
            given: By name or alias.
            name: Of the loss, for messages.

        Raises:
            LossConfigError: One is given twice.
        """
        values = _without_aliases(name, loss_class, given)
        declared = loss_class.declared_hyperparameters()
        if values and all(key in values for key, parameter in declared.items() if parameter.required):
            return values
        return {**loss_class.example, **values}

    @classmethod
    def class_of(cls, loss: Any, family: Family | None = None, name: str = "") -> type[Loss]:
        """The loss class of a class or function, with the facts that it was registered with, if it was.

        Args:
            loss: The class or function.
            family: Of a function that does not say its own.
            name: For messages, if not its own.

        Raises:
            LossConfigError: It is no loss.
        """
        return _registered_class(loss) or as_loss_class(
            loss, {}, name or getattr(loss, "__name__", repr(loss)), family=family
        )

    @classmethod
    def _load(cls) -> None:
        """Register this package's losses and those that installed packages announce as entry points."""
        if cls._loaded:
            return
        cls._loaded = True
        importlib.import_module(f"{__package__}.losses")
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            try:
                loss = entry_point.load()
                registered = cls._functions.get(entry_point.name)
                if registered is None or not _is_made_of(registered, loss):  # its module may have registered it
                    cls.register(entry_point.name)(loss)
            except Exception as error:  # a broken plugin must not take the others down; using its name still fails
                warnings.warn(
                    f"the loss '{entry_point.name}' ({entry_point.value}) could not be loaded: {error}", stacklevel=2
                )


def _without_aliases(name: str, loss_class: type[Loss], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a config gives, under the hyperparameters' own names."""
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        own = loss_class.aliases.get(key, key)
        if own in renamed:
            raise LossConfigError(f"loss '{name}': '{own}' is given twice, also under another of its names")
        renamed[own] = value
    return renamed


def _from_object(loss: Any, context: BuildContext) -> Loss:
    """A loss object or a plain function handed over in place of a configuration."""
    if isinstance(loss, Loss):
        loss.name = loss.name or type(loss).__name__
        for leaf in loss.leaves():
            leaf.origins = leaf.origins or dict.fromkeys(leaf.declared_hyperparameters(), GIVEN_OBJECT)
        return loss
    if inspect.isclass(loss):
        raise LossConfigError(f"expected a loss object, found the class {loss.__name__}: write `{loss.__name__}(...)`")
    if inspect.isfunction(loss):
        loss_class = LossFunctionRegistry.class_of(loss, context.family)
        return LossFunctionRegistry.build_class(loss_class, {}, name=loss.__name__, context=context)
    if callable(loss):
        facts = facts_of(loss)
        facts.setdefault("family", context.family)
        built = ObjectLoss.wrap(type(loss), facts).hold(loss)
        built.name = type(loss).__name__
        return built
    raise LossConfigError(
        f"`loss_function` is a name, a dict with 'type', a loss object or a function, found {loss!r} "
        f"({type(loss).__name__})"
    )


def _wrong_family(name: str, found: Family | None, wanted: Family) -> LossConfigError:
    trainer = {"preference": "DPO", "policy": "GRPO"}
    return LossConfigError(
        f"loss '{name}' is a {found} loss and cannot run in a {trainer[wanted]} trainer, which takes {wanted} losses: "
        f"{', '.join(LossFunctionRegistry.names(wanted))}"
    )


def _registered_class(loss: Any) -> type[Loss] | None:
    """The class that was registered for a function or foreign class, with the facts given then."""
    return next((found for found in LossFunctionRegistry._functions.values() if _is_made_of(found, loss)), None)


def _is_made_of(loss_class: type[Loss], loss: Any) -> bool:
    return any(getattr(loss_class, part, None) is loss for part in ("function", "wrapped")) or loss_class is loss


def _is_builtin(loss: Any) -> bool:
    return getattr(loss, "__module__", "").startswith(f"{__package__}.")


def _is_run_again(registered: type[Loss], loss: Any) -> bool:
    """Whether a notebook cell that registers a loss is run a second time."""
    return getattr(loss, "__module__", "") == "__main__" and _where(registered) == _where(loss)


def _where(loss: Any) -> str:
    loss = getattr(loss, "function", None) or getattr(loss, "wrapped", None) or loss
    return f"{getattr(loss, '__module__', '?')}.{getattr(loss, '__qualname__', loss)}"
