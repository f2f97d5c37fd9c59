"""The policy's forward pass through TRL's fused-head interface, recording what the loss declared."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import LossConfigError


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
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backbone: nn.Module | None,
        requires: Collection[str],
        temperature: float = 1.0,
        log_sum_sq_probs: bool = False,
    ) -> None:
        self.model = model
        self.backbone = backbone
        self.requires = requires
        self.temperature = temperature
        self.log_sum_sq_probs = log_sum_sq_probs
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None

    def __call__(self, *, labels: Tensor, fused_lm_head: bool = True, **kwargs: Any) -> Any:
        handle = None
        if "pooled_hidden" in self.requires:
            handle = self.backbone.register_forward_hook(self._keep_hidden)
        try:
            if "logits" in self.requires:
                return self._unfused(labels, kwargs)
            return self.model(**kwargs, labels=labels, fused_lm_head=fused_lm_head)
        finally:
            if handle is not None:
                handle.remove()

    def _keep_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    def _unfused(self, labels: Tensor, kwargs: dict[str, Any]) -> SimpleNamespace:
        outputs = self.model(**kwargs)
        # Prompt-learning adapters prepend positions; the last ones are the tokens that were passed in.
        logits = outputs.logits[:, -labels.size(1) :][:, :-1].float() / self.temperature  # (N, L - 1, V)
        self.logits = logits
        targets = labels[:, 1:]
        scored = targets != -100
        log_normaliser = torch.logsumexp(logits, dim=-1)
        chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        log_probs = logits - log_normaliser.unsqueeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        values = {
            "log_probs": chosen - log_normaliser,
            "entropy": entropy,
            "mean_logits": logits.detach().mean(-1),
        }
        if self.log_sum_sq_probs:
            values["log_sum_sq_probs"] = torch.logsumexp(2 * log_probs.detach(), dim=-1)
        masked = {name: value.masked_fill(~scored, 0) for name, value in values.items()}
        is_top1 = (logits.detach().argmax(-1) == targets) & scored
        return SimpleNamespace(**masked, is_top1=is_top1, aux_loss=getattr(outputs, "aux_loss", None))

    def pooled_hidden(self, completion_mask: Tensor) -> Tensor | None:
        """Mean last hidden state over completion tokens, float32, (N, H), if the loss required it.

        Args:
            completion_mask: 1 on completion tokens (not shifted), (N, L), L the last L positions of the sequence.
        """
        if self.hidden is None:
            return None
        hidden = self.hidden[:, -completion_mask.size(1) :]
        weights = completion_mask.to(device=hidden.device, dtype=torch.float32)
        summed = torch.einsum("nlh,nl->nh", hidden.float(), weights)
        return summed / weights.sum(1, keepdim=True).clamp(min=1)


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
