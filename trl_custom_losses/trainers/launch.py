"""From a YAML file and command-line overrides to a trained model: what the training scripts share.

The arguments are those of TRL's own scripts, with the custom configs in place of TRL's.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import trl.rewards
from accelerate import DistributedType
from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.scripts.grpo import GRPOScriptArguments

from ..adapters import look_in
from ..errors import CheckpointError, LossConfigError
from ..hyperparameters import suggestion
from .announce import logger
from .arguments import ArgumentParser
from .base import LossFunctionTrainer
from .config import CustomDPOConfig, CustomGRPOConfig
from .continued import continued_adapter, find_adapter
from .dpo import CustomDPOTrainer
from .grpo import CustomGRPOTrainer

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

#: TRL's rewards that are used as they are; `get_...` ones make a reward and are given their usual arguments.
_REWARDS = {
    "accuracy_reward": lambda: trl.rewards.accuracy_reward,
    "reasoning_accuracy_reward": lambda: trl.rewards.reasoning_accuracy_reward,
    "think_format_reward": lambda: trl.rewards.think_format_reward,
    "get_soft_overlong_punishment": lambda: trl.rewards.get_soft_overlong_punishment(
        max_completion_len=1280, soft_punish_cache=256
    ),
}

Arguments = tuple[ScriptArguments, Any, ModelConfig, DatasetMixtureConfig]


def parse(
    arguments: Sequence[str] | None, script_type: type[ScriptArguments], config_type: type, prog: str | None = None
) -> Arguments:
    """Read `--config FILE.yaml` and overrides into script, training, model and data-set arguments.

    Args:
        arguments: Command-line words; None reads the program's own.
        script_type: `ScriptArguments` or a subclass.
        config_type: `CustomDPOConfig` or `CustomGRPOConfig`.
        prog: Name shown in the usage message.

    Raises:
        LossConfigError: The file cannot be read, an argument is misspelt, or the loss or another value is refused.
        SystemExit: The words cannot be parsed (code 2), or asked for help.
    """
    look_beside_the_caller()
    parser = ArgumentParser((script_type, config_type, ModelConfig, DatasetMixtureConfig), prog=prog)
    return parser.read(sys.argv[1:] if arguments is None else arguments)


def look_beside_the_caller() -> None:
    """Let losses and rewards be named by import paths into the working directory."""
    look_in(os.getcwd())


def train_dpo(arguments: Sequence[str] | None = None, prog: str = "train_dpo") -> CustomDPOTrainer:
    """Train with DPO as the arguments say; returns the trainer after training and saving."""
    parsed = parse(arguments, ScriptArguments, CustomDPOConfig, prog=prog)
    return _run(CustomDPOTrainer, parsed)


def train_grpo(arguments: Sequence[str] | None = None, prog: str = "train_grpo") -> CustomGRPOTrainer:
    """Train with GRPO as the arguments say; returns the trainer after training and saving."""
    parsed = parse(arguments, GRPOScriptArguments, CustomGRPOConfig, prog=prog)
    script = parsed[0]
    rewards = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    rewards += [load_reward(name) for name in script.reward_funcs or []]
    if not rewards:
        raise LossConfigError("GRPO needs `reward_funcs` or `reward_model_name_or_path`; neither is set")
    return _run(CustomGRPOTrainer, parsed, reward_funcs=rewards)


def load_reward(name: str) -> Callable[..., list[float | None]]:
    """A reward function by TRL's name or by import path, `package.module.function` or `package.module:function`.

    Raises:
        LossConfigError: There is no such function, or what has that name cannot be called.
    """
    if name in _REWARDS:
        return _REWARDS[name]()
    module_name, _, attribute = name.replace(":", ".").rpartition(".")
    if not module_name:
        raise LossConfigError(
            f"there is no reward named '{name}'{suggestion(name, _REWARDS)}; known: {', '.join(_REWARDS)}, or an "
            "import path 'package.module:function'"
        )
    try:
        reward = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise LossConfigError(f"could not load the reward '{name}': {error}") from error
    if not callable(reward):
        raise LossConfigError(f"the reward '{name}' must be a function, not of type {type(reward).__name__}")
    return reward


def load_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """The data set: a mixture, a hub name, a local file, a folder of files or one written by `save_to_disk`."""
    if mixture.datasets:
        if script.dataset_name:
            logger.warning("`datasets` is given, so `dataset_name` is not used")
        return get_dataset(mixture)
    if not script.dataset_name:
        raise LossConfigError("no data: set `dataset_name` or `datasets`")
    path = Path(script.dataset_name)
    streaming = script.dataset_streaming
    if path.is_file():
        if path.suffix not in _FILE_FORMATS:
            raise LossConfigError(f"`dataset_name` {path} is not one of {', '.join(_FILE_FORMATS)}")
        return load_dataset(_FILE_FORMATS[path.suffix], data_files=str(path), streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict({script.dataset_train_split: saved})
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=streaming)


def load_model(model: ModelConfig, training: CustomDPOConfig | CustomGRPOConfig) -> dict[str, Any]:
    """The trainer's arguments that make the model: one by name, with a new adapter or without, or a trained adapter.

    Raises:
        LossConfigError: The options contradict one another, or what they need is not installed.
    """
    name, revision = model.model_name_or_path, model.model_revision
    training.model_init_kwargs = {
        "revision": revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | (training.model_init_kwargs or {})
    adapter = find_adapter(name, revision)
    if adapter is not None and model.use_peft:
        raise LossConfigError(
            f"`use_peft` asks for a new adapter, but `model_name_or_path` '{name}' is an adapter already (of "
            f"'{adapter.base_model_name_or_path}'): leave `use_peft` out to train it further, or merge it first with "
            "scripts/merge_adapter.py and train a new one on the merged model"
        )
    bits = [option for option in ("load_in_4bit", "load_in_8bit") if getattr(model, option)]
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        raise LossConfigError(f"`{bits[0]}` needs bitsandbytes: pip install 'trl-custom-losses[quantization]'")
    if bits and adapter is None and not model.use_peft:
        raise LossConfigError(f"`{bits[0]}` freezes the weights of '{name}': set `use_peft` to train an adapter on it")
    quantization = get_quantization_config(model)
    if adapter is None:
        return {"model": name, "quantization_config": quantization, "peft_config": get_peft_config(model)}
    init_arguments, training.model_init_kwargs = training.model_init_kwargs, None  # TRL loads nothing by them
    return continued_adapter(
        name, adapter, revision=revision, init_arguments=init_arguments, training=training, quantization=quantization
    )


def _run(trainer_type: type[LossFunctionTrainer], parsed: Arguments, **trainer_arguments: Any) -> Any:
    script, training, model, mixture = parsed
    dataset = load_data(script, mixture)
    evaluates = training.eval_strategy != "no"
    for split in [script.dataset_train_split, *([script.dataset_test_split] if evaluates else [])]:
        if split not in dataset:
            raise LossConfigError(f"the data set has no split '{split}'; it has {', '.join(dataset)}")
    trainer = trainer_type(
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if evaluates else None,
        **load_model(model, training),
        **trainer_arguments,
    )
    found = trainer.accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and found != DistributedType.FSDP:
        raise LossConfigError(
            f"the launcher asks for FSDP, but accelerate chose {found.value}, which spreads nothing: it has FSDP for "
            "accelerators alone. Launch with another file of recipes/accelerate/, or see the header of fsdp2.yaml"
        )
    if script.ignore_bias_buffers:
        # DDP cannot broadcast the boolean attention-bias buffers of some older models.
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [n for n, buffer in buffers if buffer.dtype == torch.bool]
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"Model saved to {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if hasattr(trainer, "end"):  # finishes the trackers; not in every transformers
        trainer.end()
    return trainer


def exit_with_message(run: Callable[[], Any]) -> None:
    """Run a script's entry point; what its user can put right ends it with one line instead of a traceback."""
    try:
        run()
    except (LossConfigError, CheckpointError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    end_rank()


def end_rank() -> None:
    """If this process is one of several, wait for the others and end it, with exit status 0; a script's last statement.

    A process whose interpreter is torn down beside torch's communication threads can be aborted by them (SIGABRT,
    "terminate called without an active exception"), which a launcher takes for a failed run although everything has
    been saved. So what runs at an exit is run here, and the rest of the teardown is left out; files that are still open
    are not flushed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    threading._shutdown()  # waits for threads at work, such as uploads, and for pools of them
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
