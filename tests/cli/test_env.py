"""`env`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest
import torch

import trl_custom_losses
from trl_custom_losses import LossFunctionRegistry

from .running import run

KEYS = ["version", "python", "platform", "packages", "devices", "losses", "trl_needed", "trl_supported"]
PACKAGES = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "evaluate", "vllm"]


def test_the_json_says_what_is_installed() -> None:
    found = run("env", "--json").json
    assert list(found) == KEYS and list(found["packages"]) == PACKAGES
    assert found["version"] == trl_custom_losses.__version__
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["losses"] == len(LossFunctionRegistry.names())
    assert found["trl_supported"] is True and "1.16" in found["trl_needed"]
    assert found["devices"] and all(isinstance(device, str) for device in found["devices"])


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("version", "supported", "text"),
    [
        ("1.16.3", True, "1.16.3 (supported; needs"),
        ("1.17.0", False, "1.17.0 (NOT supported; needs"),
        ("1.16.0.dev0", False, "1.16.0.dev0 (NOT supported"),
        (None, False, "not installed (NOT supported"),
    ],
)
def test_an_unsupported_trl_shows(
    version: str | None, supported: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, trl=version)
    assert run("env", "--json").json["trl_supported"] is supported
    assert text in run("env").out


def test_packages_that_are_missing_and_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, vllm=None, peft=None)

    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    found = run("env", "--json").json
    assert found["packages"]["vllm"] is None and found["packages"]["peft"] is None
    assert found["trl_supported"] is None and found["trl_needed"] is None
    lines = dict(line.split(maxsplit=1) for line in run("env").out.splitlines())
    assert lines["peft"] == "not installed" and "(unknown; needs unknown)" in lines["trl"]
    assert lines["losses"] == f"{found['losses']} registered"


def test_it_names_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert run("env", "--json").json["devices"][:2] == ["GPU 0", "GPU 1"]
