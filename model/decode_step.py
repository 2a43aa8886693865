"""One-token decode step of the reference model, rearranged for speed.

It computes the same function as Phi4Mini (a test compares the two). Only the order of the arithmetic differs:
- The norms' weights and the 1/sqrt(K) of the scores are folded into the projections after them.
- Rotation is q * cos + turned(q) * sin. `turned` (halves swapped, the first negated) is a permutation of the
  projection's rows, so the projection computes it too, and only two elementwise passes remain.
- Keys are stored as (K, S), so that both attention products run along S.
- A layer does no concatenation, no repetition of keys and no masking of its own.
On one CPU thread the tiny model's step is 1.2 times (batch 256) to 1.7 times (batch 64) as fast as the reference's.
Most of the remaining time goes into reading the cached keys and values. The cost is a second copy of the layers'
weights.

B rows, D model width, H query heads, G key/value heads, K head size, F MLP width, R rotary size, S cached tokens.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from phimini.kernels.backend.cpu_gemm import matmul
from phimini.model.config import ModelConfig
from phimini.model.reference import KVCache, Layer, Phi4Mini
from phimini.model.rope import rope_table


@dataclass(frozen=True, slots=True)
class _LayerState:
    """Folded weights of one layer, each ready for `x @ w`, and its part of the cache."""

    w_qkv: Tensor  # (D, (2H + 3G) * K): query and key heads, the same turned, value heads
    w_o: Tensor  # (H * K, D)
    w_gate_up: Tensor  # (D, 2F)
    w_down: Tensor  # (F, D)
    k_NGKS: Tensor  # N cache slots
    v_NGSK: Tensor


class Decoder:
    """Cache slots, and the decode step over any contiguous range of them.

    Slots are filled from a prefilled KVCache.
    """

    def __init__(self, model: Phi4Mini, num_slots: int, capacity: int) -> None:
        config, weight = model.config, model.head_weight_VD
        self.config = config
        self.embedding_VD = model.model.embed_tokens.weight
        self.norm_weight_D = model.model.norm.weight
        self.slots_N = torch.arange(num_slots, device=weight.device)
        cos, sin = rope_table(config, capacity, weight.device, weight.dtype)
        rest = config.head_dim - config.rotary_dim
        # (S, 1, K). Dimensions that are not rotated have cos 1 and sin 0.
        self.cos_S1K = F.pad(torch.cat((cos, cos), -1), (0, rest), value=1.0)[:, None]
        self.sin_S1K = F.pad(torch.cat((sin, sin), -1), (0, rest), value=0.0)[:, None]
        layers = [cast(Layer, layer) for layer in model.model.layers]
        self.layers = [_fold(layer, config, num_slots, capacity) for layer in layers]

    def admit(self, first_slot: int, cache: KVCache, rows: Tensor) -> None:
        """Copy rows of a prefilled cache into consecutive slots."""
        slots, S = slice(first_slot, first_slot + len(rows)), cache.longest
        for i, layer in enumerate(self.layers):
            layer.k_NGKS[slots, :, :, :S] = cache.k_LBGSK[i, rows, :, :S].transpose(-1, -2)
            layer.v_NGSK[slots, :, :S] = cache.v_LBGSK[i, rows, :, :S]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot over those of another."""
        for layer in self.layers:
            layer.k_NGKS[target, :, :, :length] = layer.k_NGKS[source, :, :, :length]
            layer.v_NGSK[target, :, :length] = layer.v_NGSK[source, :, :length]

    def step(self, tokens_B: Tensor, positions_B: Tensor, first_slot: int, longest: int) -> Tensor:
        """Append token b at position b of slot first_slot + b and return hidden_BD after the last norm.

        `longest` is max(positions_B) + 1, the length that attention reads.
        """
        x_BD = self.embedding_VD[tokens_B]
        cos, sin = self.cos_S1K[positions_B], self.sin_S1K[positions_B]
        hidden_BS = torch.arange(longest, device=x_BD.device) > positions_B[:, None]
        mask = torch.zeros(hidden_BS.shape, device=x_BD.device, dtype=x_BD.dtype)
        mask_B11S = mask.masked_fill_(hidden_BS, -torch.inf)[:, None, None]
        for layer in self.layers:
            y_BD = self._attend(
                layer, self._normed(x_BD), cos, sin, mask_B11S, positions_B, first_slot
            )
            x_BD = x_BD + matmul(y_BD, layer.w_o)
            gate_BF, up_BF = matmul(self._normed(x_BD), layer.w_gate_up).chunk(2, dim=-1)
            x_BD = x_BD + matmul(F.silu(gate_BF, inplace=True).mul_(up_BF), layer.w_down)
        return self._normed(x_BD) * self.norm_weight_D

    def _attend(
        self,
        layer: _LayerState,
        x_BD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask_B11S: Tensor,
        positions_B: Tensor,
        first_slot: int,
    ) -> Tensor:
        B, S = len(x_BD), mask_B11S.shape[-1]
        H, G, K = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = matmul(x_BD, layer.w_qkv).view(B, -1, K)
        qk, turned, v_BGK = heads.split([H + G, H + G, G], dim=1)
        qk.mul_(cos).addcmul_(turned, sin)
        slots = slice(first_slot, first_slot + B)
        k_BGKS, v_BGSK, rows = layer.k_NGKS[slots], layer.v_NGSK[slots], self.slots_N[:B]
        k_BGKS[rows, :, :, positions_B] = qk[:, H:]
        v_BGSK[rows, :, positions_B] = v_BGK
        q = qk[:, :H].reshape(B, G, H // G, K)
        scores = torch.matmul(q, k_BGKS[..., :S]).add_(mask_B11S)
        return torch.matmul(scores.softmax(-1), v_BGSK[:, :, :S]).view(B, -1)

    def _normed(self, x_BD: Tensor) -> Tensor:
        """RMS norm without its weight, which is folded into the next projection."""
        norm_B1 = torch.linalg.vector_norm(x_BD, dim=-1, keepdim=True, dtype=torch.float32)
        rstd_B1 = norm_B1.square_().div_(x_BD.shape[-1]).add_(self.config.norm_eps).rsqrt_()
        return (x_BD * rstd_B1).to(x_BD.dtype)


def _fold(layer: Layer, config: ModelConfig, num_slots: int, capacity: int) -> _LayerState:
    H, G, K, half = config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim // 2
    attention, mlp = layer.self_attn, layer.mlp
    weight = attention.qkv_proj.weight * layer.input_layernorm.weight
    qk, v = weight.unflatten(0, (-1, K)).split([H + G, G])
    qk[:H] *= K**-0.5
    turned = torch.zeros_like(qk)
    turned[:, :half] = -qk[:, half : 2 * half]
    turned[:, half : 2 * half] = qk[:, :half]
    return _LayerState(
        w_qkv=torch.cat((qk, turned, v)).flatten(0, 1).T.contiguous(),
        w_o=attention.o_proj.weight.T.contiguous(),
        w_gate_up=(mlp.gate_up_proj.weight * layer.post_attention_layernorm.weight).T.contiguous(),
        w_down=mlp.down_proj.weight.T.contiguous(),
        # Zeros: a masked slot is multiplied by a weight of 0, and 0 * NaN would be NaN.
        k_NGKS=weight.new_zeros(num_slots, G, K, capacity),
        v_NGSK=weight.new_zeros(num_slots, G, capacity, K),
    )
