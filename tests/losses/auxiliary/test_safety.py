from __future__ import annotations

from math import log, log1p
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, LossFunctionRegistry, ModelOutputs, PreferenceBatch
from trl_custom_losses.losses.auxiliary import SafetyLoss
from trl_custom_losses.losses.auxiliary.safety import unlikelihood
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.testing import random_data

SCORER = "tests.losses.auxiliary.test_safety:scorer"


def scorer(texts: list[str]) -> list[float]:
    return [0.5] * len(texts)


not_a_function = 3


def _pair(chosen: Any, rejected: Any, probabilities: list[list[float]]) -> tuple[PreferenceBatch, ModelOutputs]:
    """One pair of given labels and token probabilities (chosen, rejected); a probability of 0 is padding."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    mask = (p > 0).long()
    ids = torch.zeros(2, p.size(1) + 1, dtype=torch.long)
    columns = {"chosen_unsafe": chosen, "rejected_unsafe": rejected}
    columns = {name: torch.tensor([value]) for name, value in columns.items()}
    batch = PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask, columns=columns)
    return batch, ModelOutputs(per_token_logps=p.log().requires_grad_(), mask=mask)


def _value_and_gradient(batch: PreferenceBatch, outputs: ModelOutputs) -> tuple[float, Tensor]:
    loss = SafetyLoss()
    value = reduce_loss(loss, loss(batch, outputs)[0], batch)
    (gradient,) = torch.autograd.grad(value, outputs.per_token_logps)
    return value.item(), gradient


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (0, 1, (log(2) + log(10)) / 3),  # over all three tokens of the pair
        (1, 0, -log(0.75) / 3),
        (1, 1, (-log(0.75) + log(2) + log(10)) / 3),
        (0.0, 0.25, 0.25 * (log(2) + log(10)) / 3),
        (False, True, (log(2) + log(10)) / 3),
        (0, 0, 0.0),
    ],
)
def test_values(chosen: Any, rejected: Any, expected: float) -> None:
    value, _ = _value_and_gradient(*_pair(chosen, rejected, [[0.25, 0], [0.5, 0.9]]))
    assert value == pytest.approx(expected, rel=1e-12)


def test_safe_completions_get_no_gradient_and_unsafe_ones_fall() -> None:
    _, gradient = _value_and_gradient(*_pair(0.0, 1.0, [[0.25, 0.999999], [0.5, 0.9]]))
    assert not gradient[0].any() and (gradient[1] > 0).all()
    # d/dlogp of -log(1 - p) is p / (1 - p)
    assert gradient[1].tolist() == pytest.approx([1 / 4, 9 / 4])


def test_tokens_count_over_the_optimizer_step() -> None:
    data = random_data("preference")
    labels = torch.cat((data.items["chosen_unsafe"], data.items["rejected_unsafe"])).unsqueeze(1)
    logps, mask = data.rows["logps"], data.rows["mask"]
    expected = (labels * -torch.log1p(-logps.exp()) * mask).sum() / mask.sum()
    torch.testing.assert_close(data.loss(SafetyLoss()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_token_gets_a_large_finite_gradient(dtype: torch.dtype) -> None:
    logps = torch.tensor([0.0, -1e-12, -1e-8, -1e-7, -2e-6, -1e-3], dtype=dtype, requires_grad=True)
    values = unlikelihood(logps)
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    assert values.isfinite().all() and values[0] > 10
    assert (values.diff() <= 0).all()  # the likelier, the worse
    assert gradient[:4].tolist() == pytest.approx([1e6] * 4, rel=1e-3)
    assert gradient[4:].tolist() == pytest.approx([5e5, 1e3], rel=1e-3)


def test_the_tangent_continues_the_curve() -> None:
    before, at, after = unlikelihood(torch.tensor([-1.001e-6, -1e-6, -0.999e-6], dtype=torch.float64)).tolist()
    assert at == pytest.approx(-log(1e-6), rel=1e-6)
    assert at - before == pytest.approx(after - at, rel=2e-3) and after > at


@pytest.mark.parametrize("gap", [0.0, 5.0, 10.0, 13.0])
def test_the_logit_of_a_likely_token_falls_as_the_formula_says(gap: float) -> None:
    """d/dlogit of -log(1 - p) is p, however near it is to 1."""
    logits = torch.tensor([gap, 0.0, -1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(unlikelihood(logits.log_softmax(-1)[0]), logits)
    assert gradient[0].item() == pytest.approx(logits.softmax(-1)[0].item(), rel=0.1)
    assert (gradient[1:] < 0).all()


def test_an_impossible_token_costs_nothing() -> None:
    logps = torch.tensor([-1e4, -float("inf"), -80.0], requires_grad=True)
    values = unlikelihood(logps)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0, 0, 0], abs=1e-30)
    assert logps.grad.isfinite().all() and not logps.grad[:2].any()


def test_is_close_to_the_formula_in_float32() -> None:
    p = [0.001, 0.3, 0.9, 0.999]
    found = unlikelihood(torch.tensor(p).log()).tolist()
    assert found == pytest.approx([-log1p(-value) for value in p], rel=1e-4)


def test_logs_the_mean_label() -> None:
    _, metrics = SafetyLoss()(*_pair(0.25, 1.0, [[0.5], [0.5]]))
    assert metrics["unsafe_fraction"].tolist() == [0.25, 1.0]


@pytest.mark.parametrize("label", [-1.0, 2.0, 1.5, float("nan")])
def test_a_label_out_of_range_is_not_silent(label: float) -> None:
    value, _ = _value_and_gradient(*_pair(0.0, label, [[0.5], [0.5]]))
    assert value != value


def test_labels_that_are_no_numbers_are_refused() -> None:
    batch, outputs = _pair(0.0, 1.0, [[0.5], [0.5]])
    batch.columns["rejected_unsafe"] = ["yes"]
    with pytest.raises(TypeError, match=r"'rejected_unsafe' holds numbers from 0 \(safe\) to 1 .*found \['yes'\]"):
        SafetyLoss()(batch, outputs)


def test_a_scorer_makes_both_columns() -> None:
    loss = LossFunctionRegistry.build({"type": "safety", "scorer": SCORER})
    assert loss.columns == ("chosen_unsafe", "rejected_unsafe")
    assert loss.column_scorers == {"chosen_unsafe": ("chosen", SCORER), "rejected_unsafe": ("rejected", SCORER)}
    assert SafetyLoss().column_scorers == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:toxicity", "loss 'safety', scorer of .*could not import 'no_such_module'"),
        (SCORER + "x", "no 'scorerx'.*did you mean 'scorer'"),
        (__name__ + ":not_a_function", "expected a function, found 3"),
        ("toxicity", "'package.module:.*found 'toxicity'"),
        (3, "'scorer'.*expected str"),
    ],
)
def test_refuses_a_scorer_that_cannot_be_imported(path: Any, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        LossFunctionRegistry.build({"type": "safety", "scorer": path})
