"""Our ops in a transformers Phi3ForCausalLM: `apply_to(model)`, then train it in any loop.

    RMSNorm          rms_norm
    MLP              swiglu on the fused gate-up projection
    rotary embedding rope on queries and keys, with the tables that the model made
    loss             linear_cross_entropy, where `labels` are given: no logits of all tokens exist, so `logits` is None

Only this model's modules change: other models of the process keep transformers' code, unlike a patch of the module.
Nothing of transformers is imported here.
"""

import functools
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phimini.kernels.linear_cross_entropy import linear_cross_entropy
from phimini.kernels.rms_norm import rms_norm
from phimini.kernels.rope import rope
from phimini.kernels.swiglu import swiglu

IGNORE = -100


def apply_to(model: nn.Module) -> nn.Module:
    """Let a transformers Phi3ForCausalLM compute with this package's ops, in place; returns the model.

    Losses and gradients stay the same up to rounding. Raises ValueError for another model, or an activation other
    than SiLU.
    """
    if type(model).__name__ != "Phi3ForCausalLM":
        raise ValueError(
            f"apply_to: expected a transformers Phi3ForCausalLM, got {type(model).__name__}"
        )
    activation = model.config.hidden_act  # pyright: ignore[reportAttributeAccessIssue]
    if activation != "silu":
        raise ValueError(f"apply_to: expected hidden_act silu, got {activation!r}")
    forwards = {"Phi3RMSNorm": _rms_norm_forward, "Phi3MLP": _mlp_forward}
    for module in model.modules():
        name = type(module).__name__
        if name in forwards:
            module.forward = types.MethodType(forwards[name], module)
        elif name == "Phi3Attention":
            module.forward = types.MethodType(_with_our_rope(type(module).forward), module)
    model.forward = types.MethodType(_causal_lm_forward, model)
    return model


def _rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def _mlp_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_up_proj(hidden_states)))


@functools.cache
def _with_our_rope(forward: Any) -> Any:
    """Return Phi3Attention.forward with another `apply_rotary_pos_emb` in its globals; those of the module stay."""
    changed = forward.__globals__ | {"apply_rotary_pos_emb": _rotated}
    code, name = forward.__code__, forward.__name__
    ours = types.FunctionType(code, changed, name, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (B, N, S, K) and k (B, G, S, K) rotated; cos, sin (1 or B, S, R) with each half twice."""
    (B, N, S, K), G, R = q.shape, k.shape[1], cos.shape[-1]
    q_LGNK = q.transpose(1, 2).reshape(B * S, G, N // G, K)
    k_LG1K = k.transpose(1, 2).reshape(B * S, G, 1, K)
    # The op's fused projection has a value per group, which it only copies.
    fused_LGNK = torch.cat([q_LGNK, k_LG1K, k_LG1K.detach()], 2)
    cos_PR, sin_PR = (t[..., : R // 2].reshape(-1, R // 2).detach() for t in (cos, sin))
    positions_BS = torch.arange(len(cos_PR), device=q.device).view(-1, S).expand(B, S)
    q_LNK, k_LGK, _ = rope(fused_LGNK, cos_PR, sin_PR, positions_BS.reshape(-1))
    return q_LNK.view(B, S, N, K).transpose(1, 2), k_LGK.view(B, S, G, K).transpose(1, 2)


def _causal_lm_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    num_items_in_batch: int | Tensor | None = None,
    shift_labels: Tensor | None = None,
    **inputs: Any,
) -> Any:
    """Return what Phi3ForCausalLM does: with labels the loss (mean, or sum over num_items_in_batch), else logits."""
    if labels is None and shift_labels is None:
        return type(self).forward(
            self, input_ids, attention_mask, logits_to_keep=logits_to_keep, **inputs
        )
    inputs.pop("return_dict", None)
    outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    if shift_labels is None:
        assert labels is not None, "one of the two is given"
        shift_labels = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
    hidden_MD = outputs.last_hidden_state.flatten(0, -2)
    targets_M = shift_labels.reshape(-1).to(hidden_MD.device)
    total, _ = linear_cross_entropy(hidden_MD, self.lm_head.weight, targets_M, with_entropy=False)
    if num_items_in_batch is None:
        num_items_in_batch = (targets_M != IGNORE).sum()
    return sys.modules[type(self).__module__].CausalLMOutputWithPast(
        loss=total / num_items_in_batch,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
