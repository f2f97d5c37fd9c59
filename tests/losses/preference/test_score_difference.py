from __future__ import annotations

from math import exp, log

import pytest
import torch

from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.losses.preference.score_difference import FDivergence, f_prime

from ..singles import pair_loss


@pytest.mark.parametrize(
    ("divergence", "coefficient", "u", "expected"),
    [
        ("reverse_kl", 0.5, 4.0, log(4.0)),
        ("forward_kl", 0.5, 4.0, 1 - 1 / 4.0),
        ("forward_kl", 0.5, 0.25, 1 - 4.0),
        ("js_divergence", 0.5, 4.0, log(2 * 4.0 / 5.0)),
        ("alpha_divergence", 0.5, 4.0, (1 / 2.0 - 1) / -0.5),  # u^-0.5 = 1/2
        ("alpha_divergence", 0.0, 4.0, 1 - 1 / 4.0),  # forward KL
        ("alpha_divergence", 1.0, 4.0, log(4.0)),  # reverse KL
        ("alpha_divergence", 2.0, 4.0, 4.0 - 1),
    ],
)
def test_f_prime(divergence: FDivergence, coefficient: float, u: float, expected: float) -> None:
    found = f_prime(torch.tensor(log(u), dtype=torch.float64), divergence, coefficient)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_scores_are_zero_at_equal_probability_and_rise(divergence: FDivergence) -> None:
    log_u = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    scores = f_prime(log_u, divergence, 0.5)
    assert scores[2].item() == pytest.approx(0, abs=1e-15)
    assert (scores.diff() > 0).all()


def test_alpha_near_one_is_continuous() -> None:
    log_u = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(f_prime(log_u, "alpha_divergence", 1 + 1e-5), log_u, rtol=1e-4, atol=0)


def test_exponentials_are_held_at_80_nats() -> None:
    assert f_prime(torch.tensor(1e4), "alpha_divergence", 2.0).item() == pytest.approx(exp(80), rel=1e-5)
    assert f_prime(torch.tensor(-1e4), "forward_kl", 0.5).item() == pytest.approx(-exp(80), rel=1e-5)


def test_losses_use_the_scores() -> None:
    loss = SigmoidLoss(beta=0.5, f_divergence_type="forward_kl")
    margin = 0.5 * ((1 - exp(-1.0)) - (1 - exp(2.0)))
    assert pair_loss(loss, 1.0, -2.0) == pytest.approx(log(1 + exp(-margin)), rel=1e-12)
    loss = SigmoidLoss(beta=0.5, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0)
    assert pair_loss(loss, 1.0, -2.0) == pytest.approx(log(1 + exp(-0.5 * (exp(1.0) - exp(-2.0)))), rel=1e-12)
