"""Data-set columns, raw rewards, prompt groups and what a loss prepares stay with their sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from trl_custom_losses import ComposedLoss, ModelOutputs, PolicyBatch, PolicyLoss, Rollout
from trl_custom_losses.trainers import CustomGRPOTrainer

from .. import tiny
from .grpo_parity import build_custom, numbered_prompts, rollout, tool_rollout

# Generation batches of 8 completions, shuffled and split into 4 micro-batches, each used twice.
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
SPLIT |= {"num_generations": 4, "num_iterations": 2, "max_steps": 8, "optim": "sgd"}


class Recorder(PolicyLoss):
    """Policy gradient that keeps every batch it saw."""

    columns = ("weight", "answer")
    requires = frozenset({"rewards", "group_ids"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[PolicyBatch] = []

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.seen.append(batch)
        return -batch.advantages * model_outputs.per_token_logps, {}


class Preparer(Recorder):
    """Also prepares tensors that tell which completion, group and call they belong to."""

    def __init__(self, scale: float = 1.0, replaces: bool = False) -> None:
        super().__init__()
        self.scale, self.replaces = scale, replaces
        self.rollouts: list[Rollout] = []

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        self.rollouts.append(rollout)
        prepared = {
            "mark": self.scale * checksum(rollout.completion_ids, rollout.mask),
            "wide": rollout.completion_ids * rollout.mask,
            "weight_seen": rollout.columns["weight"],
            "group_mean": torch.stack(
                [rollout.rewards[rollout.group_ids == group, 0].mean() for group in rollout.group_ids]
            )[rollout.local],
            "call": torch.full((rollout.completion_ids.size(0),), len(self.rollouts)),
        }
        if self.replaces:
            prepared["advantages"] = 10 * self.scale * rollout.rewards[rollout.local, 0]
        return prepared


def checksum(ids: Tensor, mask: Tensor) -> Tensor:
    """A number that tells completions apart, (B,)."""
    return (ids * mask * torch.arange(1, ids.size(1) + 1)).sum(1).float() / 100


def checksum_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The checksum as a reward, so that a reward tells whose it is."""
    return [sum(i * token for i, token in enumerate(ids, 1)) / 100 for ids in completion_ids]


def odd_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Scores completions of odd length alone."""
    return [float(len(ids)) if len(ids) % 2 else None for ids in completion_ids]


def build(model: Path, run_arguments: dict, loss: PolicyLoss | ComposedLoss, **options: Any) -> CustomGRPOTrainer:
    data = numbered_prompts()
    trainer = {"rollout_func": rollout, "reward_funcs": [checksum_reward, odd_reward], "train_dataset": data}
    trainer |= {"eval_dataset": data.select([1, 3, 5, 7]), **options.pop("trainer", {})}
    config = {**SPLIT, "num_generations_eval": 2, "per_device_eval_batch_size": 4, **options}
    return build_custom(model, run_arguments, perturbed=False, loss_function=loss, trainer=trainer, **config)


def row_numbers(batch: PolicyBatch) -> list[int]:
    """Which row of the data each prompt is."""
    return [
        int(text.split("=")[0]) for text in tiny.tokenizer().batch_decode(batch.prompt_ids, skip_special_tokens=True)
    ]


@pytest.mark.parametrize("iterable", [False, True], ids=["map", "iterable"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("drops_unused", [False, True])
def test_columns_stay_with_their_sequences(
    dense_model: Path, run_arguments: dict, iterable: bool, mode: str, drops_unused: bool
) -> None:
    loss = Recorder()
    data = numbered_prompts()
    datasets = {"train_dataset": data, "eval_dataset": data.select([1, 3, 5, 7])}
    if iterable:
        datasets = {name: dataset.to_iterable_dataset() for name, dataset in datasets.items()}
    trainer = build(dense_model, run_arguments, loss, trainer=datasets, remove_unused_columns=drops_unused)
    if mode == "train":
        trainer.train()
    else:
        trainer.evaluate()
    seen = Counter()
    for batch in loss.seen:
        rows = row_numbers(batch)
        seen.update(rows)
        assert batch.columns["weight"].tolist() == [row + 0.5 for row in rows]
        assert batch.columns["answer"] == batch["answer"] == [f"row {row}" for row in rows]
    assert len(seen) == 4
    if mode == "train":
        assert any(len(set(row_numbers(batch))) > 1 for batch in loss.seen), "nothing was shuffled"


def test_loss_columns_still_reach_the_reward_functions(dense_model: Path, run_arguments: dict) -> None:
    rewarded: list[str] = []

    def reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        rewarded.extend(answer)
        return [float(len(text)) for text in completions]

    trainer = build(dense_model, run_arguments, Recorder(), trainer={"reward_funcs": [reward]}, max_steps=1)
    trainer.train()
    assert rewarded


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_raw_rewards_and_groups_stay_with_their_sequences(dense_model: Path, run_arguments: dict, mode: str) -> None:
    loss = Preparer()
    trainer = build(dense_model, run_arguments, loss)
    set_seed(0)
    trainer.train() if mode == "train" else trainer.evaluate()
    scored = 0
    group_of: dict[tuple[int, int], int] = {}
    for batch in loss.seen:
        assert batch.rewards.shape == (batch.mask.size(0), 2)
        torch.testing.assert_close(batch.rewards[:, 0], checksum(batch.completion_ids, batch.mask))
        lengths = batch.mask.sum(1)
        odd = lengths % 2 == 1
        assert torch.equal(batch.rewards[:, 1].isnan(), ~odd)
        assert torch.equal(batch.rewards[odd, 1], lengths[odd].float())
        scored += odd.sum().item()
        for row, group, call in zip(row_numbers(batch), batch.group_ids.tolist(), batch["call"].tolist(), strict=True):
            assert group_of.setdefault((call, row), group) == group
    assert scored
    assert len(set(group_of.items())) == len({(call, group) for (call, _), group in group_of.items()})


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_prepare_sees_whole_groups_once_a_generation_batch(dense_model: Path, run_arguments: dict, mode: str) -> None:
    loss = Preparer()
    trainer = build(dense_model, run_arguments, loss)
    trainer.train() if mode == "train" else trainer.evaluate()
    # 8 steps of 2 micro-batches, each of the 4 of a generation used twice; or 4 prompts, 2 completions each.
    assert len(loss.rollouts) == 2
    for seen in loss.rollouts:
        size = 8 if mode == "train" else 4
        assert seen.rewards.shape == (size, 2)
        assert seen.advantages.shape == (size,)
        assert seen.local == slice(0, size)
        assert torch.equal(seen.reward_weights, torch.ones(2))
        assert set(Counter(seen.group_ids.tolist()).values()) == {4 if mode == "train" else 2}
        torch.testing.assert_close(seen.rewards[:, 0], checksum(seen.completion_ids, seen.mask))
        for group in seen.group_ids.unique():
            members = (seen.group_ids == group).nonzero().flatten().tolist()
            assert len({seen.columns["answer"][index] for index in members}) == 1
            assert abs(seen.advantages[members].mean().item()) < 1e-5


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_prepared_tensors_stay_with_their_sequences(dense_model: Path, run_arguments: dict, mode: str) -> None:
    loss = Preparer()
    trainer = build(dense_model, run_arguments, loss)
    trainer.train() if mode == "train" else trainer.evaluate()
    for batch in loss.seen:
        torch.testing.assert_close(batch.prepared["mark"], checksum(batch.completion_ids, batch.mask))
        assert torch.equal(batch["wide"], batch.completion_ids * batch.mask)
        assert torch.equal(batch["weight_seen"], batch.columns["weight"])
        own = loss.rollouts[int(batch["call"][0]) - 1]
        for group, mean in zip(batch.group_ids, batch["group_mean"], strict=True):
            torch.testing.assert_close(mean, own.rewards[own.group_ids == group, 0].mean())


def test_the_rollouts_mask_leaves_out_tokens_of_tools_and_truncated_completions(
    dense_model: Path, run_arguments: dict
) -> None:
    loss = Preparer()
    options = {"trainer": {"rollout_func": tool_rollout}, "mask_truncated_completions": True, "max_steps": 2}
    build(dense_model, run_arguments, loss, **options).train()
    tokens = tiny.tokenizer()
    ids, mask = loss.rollouts[0].completion_ids, loss.rollouts[0].mask
    ended = (ids == tokens.eos_token_id).any(1, keepdim=True)
    assert ended.any()
    assert not ended.all()
    own = torch.arange(ids.size(1)) % 3 != 1
    assert torch.equal(mask, ((ids != tokens.pad_token_id) & own & ended).long())


def test_prepared_advantages_replace_the_trainers(dense_model: Path, run_arguments: dict) -> None:
    loss = Preparer(replaces=True)
    trainer = build(dense_model, run_arguments, loss)
    trainer.train()
    for batch in loss.seen:
        torch.testing.assert_close(batch.advantages, 10 * batch.rewards[:, :1])
    shown = list(trainer._logs["advantages"])
    assert shown == pytest.approx([10 * reward for reward in trainer._logs["rewards"]["checksum_reward"]])
    assert len(shown) == len(trainer._logs["prompt"]) == 8
    trainer.evaluate()  # smaller batches than the table is long
    shown = list(trainer._logs["advantages"])
    assert shown == pytest.approx([10 * reward for reward in trainer._logs["rewards"]["checksum_reward"]])


def test_advantages_prepared_per_token_reach_the_loss_and_their_mean_the_table(
    dense_model: Path, run_arguments: dict
) -> None:
    class PerToken(Preparer):
        def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
            return {"advantages": 0.01 * rollout.completion_ids * rollout.mask}

    loss = PerToken()
    trainer = build(dense_model, run_arguments, loss, max_steps=4)
    trainer.train()
    for batch in loss.seen:
        torch.testing.assert_close(batch.advantages, 0.01 * batch.completion_ids * batch.mask)
    assert len(trainer._logs["advantages"]) == len(trainer._logs["prompt"])


def test_components_keep_their_own_prepared_tensors_and_advantages(dense_model: Path, run_arguments: dict) -> None:
    one, two, plain = Preparer(scale=1.0, replaces=True), Preparer(scale=-3.0), Recorder()
    nested = ComposedLoss(components=[("one", 1.0, Preparer(scale=7.0, replaces=True))])
    loss = ComposedLoss(
        components=[("one", 1.0, one), ("two", 0.5, two), ("plain", 1.0, plain), ("nested", 1.0, nested)]
    )
    trainer = build(dense_model, run_arguments, loss)
    trainer.train()
    inner = nested.losses[0]
    assert len(one.seen) == len(two.seen) == len(plain.seen) == len(inner.seen) == 16
    for first, second, third, fourth in zip(one.seen, two.seen, plain.seen, inner.seen, strict=True):
        mark = checksum(first.completion_ids, first.mask)
        torch.testing.assert_close(first["mark"], mark)
        torch.testing.assert_close(second["mark"], -3 * mark)
        torch.testing.assert_close(fourth["mark"], 7 * mark)
        torch.testing.assert_close(first.advantages, 10 * first.rewards[:, :1])
        torch.testing.assert_close(fourth.advantages, 70 * first.rewards[:, :1])
        assert torch.equal(second.advantages, third.advantages)
        assert third.prepared == {}
    # What the others see are TRL's advantages: those of the rollout, sequence by sequence.
    trl = {round(m.item(), 4): a for r in two.rollouts for m, a in zip(r.rewards[:, 0], r.advantages, strict=True)}
    for batch in plain.seen:
        for reward, advantage in zip(batch.rewards[:, 0], batch.advantages[:, 0], strict=True):
            torch.testing.assert_close(advantage, trl[round(reward.item(), 4)])


@pytest.mark.parametrize("prepared", [torch.ones(3), torch.tensor(1.0), [1.0] * 8], ids=["rows", "scalar", "list"])
def test_prepared_values_of_the_wrong_shape_are_reported(dense_model: Path, run_arguments: dict, prepared: Any) -> None:
    class Wrong(Recorder):
        def prepare(self, rollout: Rollout) -> dict[str, Any]:
            return {"score": prepared}

    trainer = build(dense_model, run_arguments, Wrong())
    with pytest.raises(ValueError, match=r"8 rows.*'score'"):
        trainer.train()


def test_a_column_with_an_empty_value_is_reported(dense_model: Path, run_arguments: dict) -> None:
    data = numbered_prompts().map(lambda row: {"weight": None if row["answer"] == "row 3" else row["weight"]})
    trainer = build(dense_model, run_arguments, Recorder(), trainer={"train_dataset": data})
    with pytest.raises(ValueError, match="'weight'"):
        trainer.train()
