"""The policy's forward pass through TRL's fused-head interface, recording what the loss declared."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import LossConfigError

#: Elements, in float32, of what is made in passing of a whole batch's hidden states or logits: 64 MB.
_IN_PASSING = 2**24


class PolicyForward:
    """Stands in for the model in a call `model(**kwargs, labels=labels, fused_lm_head=True)`.

    Without a special requirement it is that call. With `pooled_hidden` a hook on the backbone keeps the last hidden
    state, with its gradient. With `logits` the model runs its own unfused head once, and everything the fused head
    would return is computed from those logits.

    Args:
        model: The wrapped model (DDP, DeepSpeed engine, ...), so that gradients synchronise.
        backbone: Module whose output holds `last_hidden_state`; needed for `pooled_hidden`.
        requires: Fields that the loss declared.
        temperature: What logits are divided by before the softmax.
        log_sum_sq_probs: Whether WPO's weights need log sum_v p_v^2.
        positions: How many of the last positions `logits` and what is computed from them hold; None for all. Cut here
            and not later, so that log-probabilities are computed from the very tensor that the loss sees.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backbone: nn.Module | None,
        requires: Collection[str],
        temperature: float = 1.0,
        log_sum_sq_probs: bool = False,
        positions: int | None = None,
    ) -> None:
        self.model = model
        self.backbone = backbone
        self.requires = requires
        self.temperature = temperature
        self.log_sum_sq_probs = log_sum_sq_probs
        self.first_position = 0 if positions is None else -positions
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self.second_logits: Tensor | None = None

    def __call__(self, *, labels: Tensor, fused_lm_head: bool = True, **kwargs: Any) -> Any:
        handle = None
        if {"pooled_hidden", "sequence_hidden"} & set(self.requires):
            handle = self.backbone.register_forward_hook(self._keep_hidden)
        try:
            if "logits" in self.requires:
                outputs = self._unfused(labels, kwargs)
                if "second_logits" in self.requires:
                    # Without dropout, as in evaluation, it would only repeat the first.
                    self.second_logits = self._logits(labels, kwargs)[0] if self.model.training else self.logits
                return outputs
            return self.model(**kwargs, labels=labels, fused_lm_head=fused_lm_head)
        finally:
            if handle is not None:
                handle.remove()

    def _keep_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    def _unfused(self, labels: Tensor, kwargs: dict[str, Any]) -> SimpleNamespace:
        logits, outputs = self._logits(labels, kwargs)
        self.logits = logits
        targets = labels[:, 1:][:, self.first_position :]
        scored = targets != -100
        log_normaliser = torch.logsumexp(logits, dim=-1)
        chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        values = {
            "log_probs": chosen - log_normaliser,
            "entropy": _entropies(logits),
            "mean_logits": logits.detach().mean(-1),
        }
        if self.log_sum_sq_probs:
            with torch.no_grad():
                pieces, dim = _in_pieces(logits)
                squares = torch.cat([torch.logsumexp(2 * piece, dim=-1) for piece in pieces], dim)
            values["log_sum_sq_probs"] = squares - 2 * log_normaliser.detach()
        masked = {name: value.masked_fill(~scored, 0) for name, value in values.items()}
        is_top1 = (logits.detach().argmax(-1) == targets) & scored
        return SimpleNamespace(**masked, is_top1=is_top1, aux_loss=getattr(outputs, "aux_loss", None))

    def _logits(self, labels: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Logits that predict each token but the first, or the last ones, over the temperature, (N, T, V), and the
        model's output."""
        outputs = self.model(**kwargs)
        # Prompt-learning adapters prepend positions; the last ones are the tokens that were passed in.
        logits = outputs.logits[:, -labels.size(1) :][:, :-1][:, self.first_position :]
        if logits.dtype == torch.float32 and self.temperature == 1 and 2 * logits.numel() < outputs.logits.numel():
            logits = logits.clone()  # a view would keep the prompt's logits, too
        logits = logits.float()
        return logits if self.temperature == 1 else logits / self.temperature, outputs

    def hidden_fields(self, completion_mask: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The fields of `ModelOutputs` made of hidden states that the loss required.

        Args:
            completion_mask: 1 on scored completion tokens (not shifted), (N, L), the last L positions.
            attention_mask: 1 on tokens of prompt and completion, (N, L'), the last L' positions.
        """
        fields = {}
        if "pooled_hidden" in self.requires:
            fields["pooled_hidden"] = self.pooled(completion_mask)
        if "sequence_hidden" in self.requires:
            with torch.no_grad():
                fields["sequence_hidden"] = self.pooled(attention_mask)
        return fields

    def pooled(self, mask: Tensor) -> Tensor:
        """Mean last hidden state over the positions where `mask` is 1, float32, (N, H).

        Args:
            mask: (N, L), for the last L positions of the sequence.
        """
        hidden = self.hidden[:, -mask.size(1) :]
        weights = mask.to(device=hidden.device, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # which would compute the product in half precision
            # Half precision is widened some rows at a time, never the whole batch; float32 is not copied.
            rows = max(1, hidden.size(0) if hidden.dtype == torch.float32 else _IN_PASSING // hidden[0].numel())
            pairs = zip(hidden.split(rows), weights.split(rows), strict=True)
            summed = [torch.einsum("nlh,nl->nh", part.float(), weight) for part, weight in pairs]
        return torch.cat(summed) / weights.sum(1, keepdim=True).clamp(min=1)


def _in_pieces(tensor: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Views of as much of a tensor (N, L, D) at a time as may be worked on in passing, and the dimension they split."""
    rows = _IN_PASSING // max(1, tensor[0].numel())
    if rows:
        return tensor.split(rows), 0
    return tensor.split(max(1, _IN_PASSING // max(1, tensor[:, 0].numel())), dim=1), 1


def _entropies(logits: Tensor) -> Tensor:
    """Entropy of each position, (N, T), nats.

    Its gradient, which most losses do not ask for, computes the probabilities again: kept for it, they would be three
    times the logits.

    Args:
        logits: (N, T, V).
    """
    pieces, dim = _in_pieces(logits)
    found = [checkpoint(_entropy, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(found, dim)


def _entropy(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


class RecordingModel:
    """Calls a model and keeps its output, for TRL methods that return sums where a loss needs every token."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        self.outputs = self.model(**kwargs)
        return self.outputs


def find_backbone(model: nn.Module) -> nn.Module:
    """The module under the language-model head of an unwrapped (PEFT or plain) transformers model.

    Raises:
        LossConfigError: The model does not expose one.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = causal.base_model if isinstance(causal, PreTrainedModel) else None
    if backbone is None or backbone is causal:
        raise LossConfigError(
            f"the loss needs the last hidden state, but {type(causal).__name__} exposes no backbone "
            "(`base_model`) to take it from"
        )
    return backbone


def check_dropout(model: nn.Module, loss: str) -> None:
    """Refuse a model without dropout for a loss that compares two stochastic passes.

    Raises:
        LossConfigError: No module drops anything.
    """
    # Attention layers without a module for it hold their dropout as a number; the model's config is not asked, since
    # `disable_dropout` leaves it as it was.
    rates = [
        module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        for module in model.modules()
    ]
    if not any(isinstance(rate, float) and rate > 0 for rate in rates):
        raise LossConfigError(
            f"the loss '{loss}' compares two forward passes with different dropout, but the model has none: set a "
            "dropout (in the model's config, or `lora_dropout`) and `disable_dropout=False`"
        )


def keep_differentiable(model: nn.Module) -> None:
    """Have the 4-bit layers of bitsandbytes stay differentiable on a CPU.

    Where the processor can multiply bfloat16 (AVX512-BF16), they repack their weights for inference at the first
    forward pass in evaluation mode, for good, and from then on let no gradient through.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
