"""Configs of the custom trainers: TRL's, plus the loss. No postponed annotations: argument parsers read the types."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig

from ..base import Loss
from ..errors import LossConfigError
from ..registry import BuildContext, LossFunctionRegistry
from ..types import Family

#: TRL fields that choose TRL's own objective and therefore exclude `loss_function`.
_STOCK_OBJECTIVE = ("loss_type", "loss_weights")


@dataclass
class LossFunctionArguments:
    """The fields that both custom configs add.

    Args:
        loss_function: The objective: a name from the registry, an import path `package.module:Loss`, or a dict with
            `type` and hyperparameters (on a command line: JSON). Left-out hyperparameters fall back to this config's
            field of the same name, then to the loss's default. None trains exactly as TRL.
        stop_on_nonfinite_loss: Stop with an error that names the loss and what was not finite, before the optimizer
            moves. False continues, and `logging_nan_inf_filter` decides what is logged, as in TRL.
    """

    loss_function: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Objective: a registered loss's name, an import path 'package.module:Loss', or a dict (JSON) with "
            "'type' and hyperparameters. Not set: exactly TRL."
        },
    )
    stop_on_nonfinite_loss: bool = field(
        default=True,
        metadata={"help": "Stop training with an error when the loss is NaN or infinite."},
    )

    def __post_init__(self) -> None:
        self.loss_function = parse_loss_function(self.loss_function)
        super().__post_init__()  # TRL's, which runs after ours in the method resolution order
        if self.loss_function is not None:
            build_loss(self.loss_function, self)  # raises on anything that could not be built later
        if self.use_cpu:
            _let_deepspeed_know_its_ranks()


@dataclass
class CustomDPOConfig(LossFunctionArguments, DPOConfig):
    """`trl.DPOConfig` with `loss_function` and `stop_on_nonfinite_loss` (see `LossFunctionArguments`)."""


@dataclass
class CustomGRPOConfig(LossFunctionArguments, GRPOConfig):
    """`trl.GRPOConfig` with `loss_function` and `stop_on_nonfinite_loss` (see `LossFunctionArguments`)."""


def _let_deepspeed_know_its_ranks() -> None:
    """Give DeepSpeed the process group of a run on CPUs.

    With `use_cpu` accelerate starts the group and tells DeepSpeed nothing; under ZeRO-3 a model loaded before the
    trainer prepares its own, such as the reference, would then be partitioned as if there were one process.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if launched and torch.distributed.is_initialized():
        from deepspeed import comm

        if not comm.is_initialized():
            comm.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


def parse_loss_function(value: Any) -> Any:
    """Read the JSON form of a loss that a command line passes; anything else is returned as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value, object_pairs_hook=_without_repeats)
    except LossConfigError:
        raise
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise LossConfigError(f"`loss_function` is not valid JSON ({error}): {value[:500]}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; of a key that is given twice, a dict would keep the last."""
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise LossConfigError(f"`loss_function`: the key {key!r} is given twice in one JSON object")
        seen.add(key)
    return dict(pairs)


def build_loss(loss_function: Any, config: DPOConfig | GRPOConfig) -> Loss:
    """Build the loss for a trainer's config and check that the two agree.

    Args:
        loss_function: Name, dict, loss object or function.
        config: The trainer's config.

    Raises:
        LossConfigError: The loss cannot be built, or an option of the config cannot be honoured with it.
    """
    family = family_of(config)
    _check_no_stock_objective(config)
    fields = objective_fields(config)
    context = BuildContext(
        family=family,
        defaults=fields,
        defaults_from=type(config).__name__,
        untouched=frozenset(name for name in fields if not is_set(config, name)),
    )
    # What a loss starts from at random is the same on every rank, and what a model is made from afterwards is as it
    # would be without a loss.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        loss = LossFunctionRegistry.build(parse_loss_function(loss_function), context=context)
    check_parallelism(config.parallelism_config)
    (_check_dpo_options if family == "preference" else _check_grpo_options)(loss, config)
    return loss


def family_of(config: Any) -> Family:
    """The family of losses that a config's trainer takes."""
    return "preference" if isinstance(config, DPOConfig) else "policy"


def objective_fields(config: Any) -> Mapping[str, Any]:
    """Fields of TRL's (or the user's) config class, without those of every `TrainingArguments`: a `warmup_steps` or
    `seed` of a loss must never be filled from the optimizer's."""
    general = {declared.name for declared in dataclasses.fields(TrainingArguments)}
    return {
        declared.name: getattr(config, declared.name)
        for declared in dataclasses.fields(config)
        if declared.name not in general and declared.init
    }


def is_set(config: Any, name: str) -> bool:
    """Whether a field differs from the default of its config class."""
    return getattr(config, name) != _default(type(config), name)


def _default(config_class: type, name: str) -> Any:
    declared = config_class.__dataclass_fields__[name]
    return declared.default if declared.default_factory is dataclasses.MISSING else declared.default_factory()


def _check_no_stock_objective(config: Any) -> None:
    trl_class = DPOConfig if family_of(config) == "preference" else GRPOConfig
    for name in _STOCK_OBJECTIVE:
        if name not in trl_class.__dataclass_fields__:
            continue
        found, default = getattr(config, name), _default(trl_class, name)
        if found != default:
            raise LossConfigError(
                f"`loss_function` and `{name}={found!r}` both choose the objective: leave `{name}` at its default "
                f"({default!r}) or drop `loss_function`. A list of losses is `loss_function: {{type: composed, "
                "components: [...]}`"
            )


def _check_dpo_options(loss: Loss, config: Any) -> None:
    divergence = config.f_divergence_type
    for leaf in loss.leaves():
        if divergence != "reverse_kl" and leaf.f_divergence == "unsupported":
            raise LossConfigError(
                f"`f_divergence_type={divergence!r}` has no meaning for the loss '{leaf.name}', which is not built on "
                "the difference of f-divergence scores; use 'reverse_kl'"
            )
        if config.use_weighting and leaf.batch_coupled:
            raise LossConfigError(
                f"`use_weighting=True` weights single pairs, but the loss '{leaf.name}' couples the pairs of a batch; "
                "set `use_weighting=False`"
            )
    # A composition may need them for itself; the last of the tree that needs them is an innermost one.
    needing = [part.name for part in loss.tree() if "ref_per_token_logps" in part.requires]
    if config.precompute_ref_log_probs and needing:
        raise LossConfigError(
            f"the loss '{needing[-1]}' needs per-token reference log-probabilities, but "
            "`precompute_ref_log_probs=True` keeps only their sums; set it to False"
        )


def _check_grpo_options(loss: Loss, config: Any) -> None:
    mode = config.vllm_importance_sampling_mode
    corrects = config.use_vllm and config.vllm_importance_sampling_correction
    for leaf in loss.leaves():
        if corrects and leaf.uses_importance_sampling_ratio and mode not in ("token_truncate", "token_mask"):
            raise LossConfigError(
                f"the loss '{leaf.name}' multiplies vLLM's ratios over a sequence itself and needs them per token: "
                f"set `vllm_importance_sampling_mode` to 'token_truncate' or 'token_mask', found {mode!r}"
            )


def check_parallelism(parallelism: Any) -> None:
    """Refuse context and sequence parallelism, from the config or from the launcher."""
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise LossConfigError(
            "`loss_function` needs whole sequences on a rank, but `parallelism_config` splits them (cp_size or "
            "sp_size > 1); set both to 1"
        )
