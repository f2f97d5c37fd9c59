"""`env`: what a bug report needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

import torch
import typer
from packaging.requirements import Requirement

from ..registry import LossFunctionRegistry
from .options import AsJson
from .output import print_json

_PACKAGE = "trl-custom-losses"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "evaluate", "vllm")


def env(as_json: AsJson = False) -> None:
    """Print what a bug report needs.

    Versions, devices, the number of registered losses, and whether trl is supported.
    """
    found = environment()
    if as_json:
        print_json(found)
        return
    lines = {
        _PACKAGE: found["version"],
        "python": f"{found['python']} on {found['platform']}",
        **{name: version or "not installed" for name, version in found["packages"].items()},
        "devices": ", ".join(found["devices"]),
        "losses": f"{found['losses']} registered",
    }
    supported = {True: "supported", False: "NOT supported", None: "unknown"}[found["trl_supported"]]
    lines["trl"] += f" ({supported}; needs {found['trl_needed'] or 'unknown'})"
    width = max(map(len, lines))
    typer.echo("\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items()))


def environment() -> dict[str, Any]:
    """The same for JSON; packages that are not installed are None."""
    packages = {name: _version(name) for name in _PACKAGES}
    needed = _needed_trl()
    supported = None
    if needed is not None:
        supported = packages["trl"] is not None and needed.specifier.contains(packages["trl"], prereleases=True)
    return {
        "version": version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": _devices(),
        "losses": len(LossFunctionRegistry.names()),
        "trl_needed": None if needed is None else str(needed.specifier),
        "trl_supported": supported,
    }


def version() -> str:
    """The package's version."""
    return importlib.import_module("trl_custom_losses").__version__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needed_trl() -> Requirement | None:
    """What the installed package says of trl; None if it is not installed."""
    try:
        needed = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((found for found in map(Requirement, needed) if found.name == "trl"), None)


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    gpus += ["mps"] if torch.backends.mps.is_available() else []
    return [*gpus, f"cpu ({torch.get_num_threads()} threads)"]
