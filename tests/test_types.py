"""Batches, model outputs and what the framework applies around a loss."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import (
    Denominators,
    MissingFieldError,
    ModelOutputs,
    PolicyBatch,
    PolicyLoss,
    PreferenceBatch,
    PreferenceLoss,
    Rollout,
)
from trl_custom_losses.types import masked_sum

_MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])


def _preference(**fields: Any) -> PreferenceBatch:
    ids = torch.zeros(4, 4, dtype=torch.long)
    return PreferenceBatch(input_ids=ids, attention_mask=ids, mask=_MASK, **fields)


def _policy(**fields: Any) -> PolicyBatch:
    fields = {"advantages": torch.ones(4), **fields}
    return PolicyBatch(prompt_ids=_MASK, completion_ids=_MASK, mask=_MASK, **fields)


def _outputs(**fields: Any) -> ModelOutputs:
    return ModelOutputs(per_token_logps=-torch.arange(1.0, 13.0).view(4, 3), mask=_MASK, **fields)


# Missing fields


@pytest.mark.parametrize("part", [_preference(), _policy(), _outputs()], ids=lambda part: type(part).__name__)
def test_reading_an_absent_field_says_what_to_declare(part: Any) -> None:
    with pytest.raises(MissingFieldError, match=r"requires = \{'pooled_hidden'\}"):
        _ = part.pooled_hidden
    assert not part.has("pooled_hidden")
    assert isinstance(MissingFieldError(), AttributeError)
    assert getattr(part, "pooled_hidden", None) is None


def test_present_fields_are_had() -> None:
    outputs = _outputs(pooled_hidden=torch.zeros(4, 2))
    assert outputs.has("pooled_hidden") and outputs.pooled_hidden.shape == (4, 2)
    assert _preference(pair_weights=torch.ones(2)).has("pair_weights")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_absent_fields_stay_absent_in_copies(how: Any) -> None:
    copied = how(_outputs())
    assert torch.equal(copied.logps, _outputs().logps)
    with pytest.raises(MissingFieldError):
        _ = copied.ref_per_token_logps


@pytest.mark.parametrize("part", [_preference(), _policy(), _outputs()], ids=lambda part: type(part).__name__)
def test_can_be_printed_without_the_absent_fields(part: Any) -> None:
    assert repr(part).startswith(type(part).__name__)


def test_reference_is_missing_unless_given() -> None:
    with pytest.raises(MissingFieldError):
        _ = _outputs().log_ratios


# Sums


def test_masked_sum_ignores_what_is_masked() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), 0.0]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    total.sum().backward()
    assert total.tolist() == [3.0, 3.0]
    assert values.grad.tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("dirt", [torch.nan, torch.inf, 1e9])
def test_losses_see_zero_at_masked_positions(dirt: float) -> None:
    fields = {
        name: torch.full((4, 3), -2.0).masked_fill(_MASK == 0, dirt).requires_grad_()
        for name in ("per_token_logps", "entropies", "ref_per_token_logps", "old_per_token_logps")
    }
    outputs = ModelOutputs(mask=_MASK, **fields)
    for name in fields:
        assert torch.equal(getattr(outputs, name), -2.0 * _MASK), name
    (outputs.per_token_logps.exp() + outputs.entropies.exp()).sum().backward()
    for name in ("per_token_logps", "entropies"):
        assert torch.equal(fields[name].grad != 0, _MASK == 1), name


def test_only_the_policy_is_differentiated() -> None:
    fields = {
        "ref_per_token_logps": torch.ones(4, 3, requires_grad=True),
        "old_per_token_logps": torch.ones(4, 3, requires_grad=True),
        "ref_sums": torch.ones(4, requires_grad=True),
        "token_weights": torch.ones(4, 3, requires_grad=True),
    }
    outputs = _outputs(**fields)
    assert not any(getattr(outputs, name).requires_grad for name in fields)


def test_outputs_sum_over_scored_tokens() -> None:
    outputs = _outputs()
    assert outputs.logps.tolist() == [-1 - 2, -4, -7 - 8 - 9, 0]
    assert outputs.lengths.tolist() == [2, 1, 3, 1]  # never 0
    assert outputs.mean_logps.tolist() == [-1.5, -4, -8, 0]
    outputs = _outputs(completion_lengths=torch.tensor([3, 1, 4, 0]))  # with a first token that nothing predicts
    assert outputs.lengths.tolist() == [3, 1, 4, 1]
    assert outputs.mean_logps.tolist() == [-1, -4, -6, 0]


def test_reference_sums_per_token_or_precomputed() -> None:
    per_token = _outputs(ref_per_token_logps=-torch.ones(4, 3))
    assert per_token.ref_logps.tolist() == [-2, -1, -3, 0]
    assert per_token.log_ratios.tolist() == [-3 + 2, -4 + 1, -24 + 3, 0]
    precomputed = _outputs(ref_sums=torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert precomputed.log_ratios.tolist() == [-3 + 1, -4 + 2, -24 + 3, 4]


def test_token_weights_act_on_policy_and_reference() -> None:
    weights = torch.tensor([[1.0, 0.5, 9.0]]).expand(4, 3)
    outputs = _outputs(ref_per_token_logps=-torch.ones(4, 3), token_weights=weights)
    assert outputs.logps[0].item() == -1 - 0.5 * 2
    assert outputs.ref_logps[0].item() == -1 - 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_except_logits(dtype: torch.dtype) -> None:
    outputs = ModelOutputs(
        per_token_logps=torch.zeros(2, 3, dtype=dtype),
        mask=_MASK[:2],
        old_per_token_logps=torch.zeros(2, 3, dtype=dtype),
        logits=torch.zeros(2, 3, 5, dtype=dtype),
    )
    assert outputs.per_token_logps.dtype is outputs.old_per_token_logps.dtype is torch.float32
    assert outputs.logits.dtype is dtype


# Rows and denominators


def test_preference_rows_are_pairs_or_completions() -> None:
    batch = _preference(denominators=Denominators(sequences=10, tokens=70.0, chosen_tokens=30.0))
    assert batch.num_pairs == 2
    mask, sequences, tokens = batch.rows(2)
    assert torch.equal(mask, _MASK[:2]) and (sequences, tokens) == (10, 30.0)
    mask, sequences, tokens = batch.rows(4)
    assert torch.equal(mask, _MASK) and (sequences, tokens) == (20, 70.0)
    with pytest.raises(ValueError, match="found 3"):
        batch.rows(3)


def test_policy_rows_are_sequences() -> None:
    batch = _policy(denominators=Denominators(sequences=10, tokens=70.0))
    assert batch.rows(4)[1:] == (10, 70.0)
    with pytest.raises(ValueError, match="4 rows for this batch, found 2"):
        batch.rows(2)


def test_without_denominators_the_micro_batch_is_the_batch() -> None:
    own = _preference().denominators
    assert (own.sequences, own.tokens.item(), own.chosen_tokens.item(), own.micro_batches) == (2, 6, 3, 1)
    own = _policy().denominators
    assert (own.sequences, own.tokens.item(), own.micro_batches) == (4, 6, 1)


def test_advantages_get_a_token_dimension() -> None:
    assert _policy(advantages=torch.ones(4)).advantages.shape == (4, 1)
    assert _policy(advantages=torch.ones(4, 3)).advantages.shape == (4, 3)


def test_columns_and_prepared_tensors_by_name() -> None:
    assert _preference(columns={"label": ["a", "b"]})["label"] == ["a", "b"]
    batch = _policy(columns={"x": torch.zeros(4), "y": torch.ones(4)}, prepared={"x": torch.full((4,), 2.0)})
    assert batch["x"][0] == 2 and batch["y"][0] == 1  # what was prepared comes first
    with pytest.raises(KeyError):
        batch["z"]


# Modifiers


class _Pairs(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return torch.ones(batch.num_pairs), {}


class _Surrogate(PolicyLoss):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return torch.ones_like(model_outputs.per_token_logps), {}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (torch.ones(2), [2.0, 4.0]),
        (torch.ones(4), [2.0, 4.0, 2.0, 4.0]),
        (torch.ones(2, 1), [[2.0], [4.0]]),
        (torch.ones(4, 2), [[2.0, 2.0], [4.0, 4.0], [2.0, 2.0], [4.0, 4.0]]),
    ],
)
def test_pair_weights_multiply_both_completions_of_a_pair(raw: Tensor, expected: list) -> None:
    assert _preference(pair_weights=torch.tensor([2.0, 4.0])).apply_modifiers(_Pairs(), raw).tolist() == expected


def test_mean_pair_weight() -> None:
    loss = _Pairs()
    loss.pair_weighting = "mean"
    weighted = _preference(pair_weights=torch.tensor([2.0, 4.0])).apply_modifiers(loss, torch.ones(2))
    assert weighted.tolist() == [3.0, 3.0]


def test_pair_weights_refuse_a_scalar() -> None:
    with pytest.raises(ValueError, match="use_weighting"):
        _preference(pair_weights=torch.ones(2)).apply_modifiers(_Pairs(), torch.tensor(1.0))
    assert _preference().apply_modifiers(_Pairs(), torch.tensor(1.0)) == 1


def test_policy_masks_and_ratios_multiply_the_surrogate() -> None:
    keep = torch.tensor([[1.0], [0.0], [1.0], [1.0]]).expand(4, 3)
    ratio = torch.full((4, 3), 0.5)
    raw = torch.ones(4, 3)
    batch = _policy(entropy_mask=keep, importance_sampling_ratio=ratio)
    assert batch.apply_modifiers(_Surrogate(), raw).tolist() == (0.5 * keep * raw).tolist()
    loss = _Surrogate()
    loss.uses_importance_sampling_ratio = True
    assert batch.apply_modifiers(loss, raw).tolist() == (keep * raw).tolist()
    loss.surrogate = False
    assert batch.apply_modifiers(loss, raw).tolist() == raw.tolist()
    assert batch.apply_modifiers(loss, torch.ones(4)).tolist() == [1.0] * 4


def test_off_policy_sequences_are_dropped_where_the_advantage_is_negative() -> None:
    on_policy = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    batch = _policy(on_policy_mask=on_policy, advantages=torch.tensor([-1.0, -1.0, 0.0, 1.0]))
    assert batch.apply_modifiers(_Surrogate(), torch.ones(4, 1)).tolist() == [[1], [0], [1], [1]]
    per_token = torch.tensor([[-1.0, 1.0, -1.0]]).expand(4, 3)
    batch = _policy(on_policy_mask=on_policy, advantages=per_token)
    assert batch.apply_modifiers(_Surrogate(), torch.ones(4, 3))[:2].tolist() == [[1, 1, 1], [0, 1, 0]]
    own = _policy(on_policy_mask=on_policy, prepared={"a.advantages": torch.full((4,), -1.0)}).scoped("a")
    assert own.apply_modifiers(_Surrogate(), torch.ones(4, 1)).tolist() == [[1], [0], [0], [0]]


@pytest.mark.parametrize("field", ["on_policy_mask", "entropy_mask", "importance_sampling_ratio"])
def test_policy_modifiers_need_tokens(field: str) -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        _policy(**{field: torch.ones(4, 1)}).apply_modifiers(_Surrogate(), torch.ones(4))


# Scopes of components


def test_a_component_sees_only_what_it_prepared() -> None:
    one, other = torch.full((4,), 5.0), torch.full((4,), 7.0)
    batch = _policy(prepared={"a.x": one, "b.x": other, "a.advantages": one}, columns={"c": one})
    scoped = batch.scoped("a")
    assert scoped["x"] is one and set(scoped.prepared) == {"x", "advantages"}
    assert scoped.advantages.tolist() == [[5.0]] * 4 and scoped["c"] is one
    assert batch.scoped("b").advantages.tolist() == [[1.0]] * 4
    assert batch.advantages.tolist() == [[1.0]] * 4
    assert scoped.denominators is batch.denominators
    assert not scoped.has("rewards")


def test_scopes_nest() -> None:
    rollout = Rollout.__new__(Rollout)
    named = rollout.scoped_result("outer", rollout.scoped_result("inner", {"x": torch.ones(4)}))
    assert list(named) == ["outer.inner.x"]
    assert _policy(prepared=named).scoped("outer").scoped("inner")["x"].tolist() == [1.0] * 4


def test_preference_batches_have_one_scope() -> None:
    batch = _preference()
    assert batch.scoped("a") is batch


def test_gradients_are_masked_by_position_and_not_by_shape() -> None:
    """A hidden state as wide as the completions are long has no positions."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    logps, hidden = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    outputs = ModelOutputs(per_token_logps=logps, mask=mask, pooled_hidden=hidden)
    loss = (outputs.per_token_logps + outputs.pooled_hidden).sum()  # sums over padding too
    on_logps, on_hidden = outputs.gradients(loss)
    assert on_logps.tolist() == mask.tolist() and on_hidden.tolist() == [[1] * 3] * 2
    (unused,) = ModelOutputs(per_token_logps=logps, mask=mask).gradients(hidden.sum())
    assert not unused.any()
