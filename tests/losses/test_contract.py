"""What holds for every registered loss: the conformance kit, on each of them and on some variants."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_custom_losses import LossFunctionRegistry
from trl_custom_losses.registry import BuildContext
from trl_custom_losses.testing import CHECKS, check_loss, random_data, run_checks

from .configs import configs

_CASES = [
    pytest.param(family, name, id=f"{family}:{name}") for family in ("preference", "policy") for name in configs(family)
]


@pytest.mark.parametrize("name", LossFunctionRegistry.names())
def test_registry_name_is_module_name_and_test_name(name: str) -> None:
    package, losses, room, module = LossFunctionRegistry.get(name).__module__.split(".")
    assert (package, losses, module) == ("trl_custom_losses", "losses", name)
    assert room in (LossFunctionRegistry.get(name).family, "auxiliary", "composite")
    assert Path(__file__).with_name(room).joinpath(f"test_{name}.py").is_file(), f"{name} has no tests"


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize(("family", "case"), _CASES)
def test_passes(family: Any, case: str, name: str) -> None:
    check_loss(configs(family)[case], checks=[name], family=family)


@pytest.mark.parametrize("name", LossFunctionRegistry.names())
def test_passes_by_its_name_alone(name: str) -> None:
    """What a hyperparameter without a default is then, the loss's `example` says."""
    report = run_checks(name, checks=["returns", "padding"])
    assert report.ok, str(report)


@pytest.mark.parametrize(("family", "case"), _CASES)
def test_copies_are_equal(family: Any, case: str) -> None:
    loss = LossFunctionRegistry.build(configs(family)[case], context=BuildContext(family=family))
    data = random_data(family)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert copied is not loss and repr(copied) == repr(loss)
        assert (copied.name, copied.origins) == (loss.name, loss.origins)
        assert torch.equal(data.loss(copied), data.loss(loss))
