"""Phi-4-Mini, readable and single-device: the definition against which other implementations are tested.

B batch, T tokens, D model width, H query heads, G key/value heads, K head size, F MLP width, V vocabulary,
S cached tokens, L layers, R rotary size. Parameter names are Hugging Face's (`Phi3ForCausalLM`), so state dicts
interchange. Norms and rope angles are computed in fp32 (fp64 for an fp64 model).

Three ways to call `forward`:
- plain: rows of one length, or right-padded rows of mixed lengths. Attention is causal, so a real token never
  sees the padding after it and needs no mask. Ignore the outputs at the padding.
- packed: one row of several documents with their boundaries in `cu_seqlens`. Positions restart at each.
- cached: the tokens continue each row of a `KVCache` from that row's length.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phimini.kernels.linear import linear
from phimini.model.config import ModelConfig
from phimini.model.rope import apply_rope, rope_at


class KVCache:
    """Keys and values of every layer for B rows of different lengths.

    Token t of a row is stored at index t, so a key is visible exactly if its index is at most the query's position.
    Slots beyond a row's length hold stale values, which the mask hides and the next tokens overwrite.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        # Zeros: a masked slot is multiplied by a weight of 0, and 0 * NaN would be NaN.
        self.k_LBGSK = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSK = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0
        """max(lengths_B), kept on the host to avoid a device synchronisation"""

    def set_lengths(self, lengths: list[int]) -> None:
        """Set the length of each row; tokens beyond it are dropped. Used after a right-padded prefill."""
        self.lengths_B = torch.tensor(lengths, device=self.lengths_B.device)
        self.longest = max(lengths)


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """Slots of a cache that this call writes, and the mask of the keys that each token may see."""

    cache: KVCache
    positions_BT: Tensor
    mask_BTS: Tensor
    """0 or -inf, added to the scores"""


@dataclass(frozen=True, slots=True)
class Context:
    """Inputs of one forward call that all layers share."""

    cos: Tensor  # (T, 1, R/2) or (B, T, 1, R/2): one table for all heads
    sin: Tensor
    documents: list[slice] | None
    cached: CachedKeys | None


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps).to(x_BTD.dtype)


class Linear(nn.Linear):
    """Linear layer without a bias, computed by the faster CPU library."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(x, self.weight)


class Attention(nn.Module):
    """Grouped-query attention: query head h reads key/value head h // (H / G)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.H, self.G, self.K = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = Linear(config.model_dim, (self.H + 2 * self.G) * self.K)
        self.o_proj = Linear(self.H * self.K, config.model_dim)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        heads = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.K))
        qk, v_BTGK = heads.split([self.H + self.G, self.G], dim=-2)
        q_BTHK, k_BTGK = apply_rope(qk, context.cos, context.sin).split([self.H, self.G], dim=-2)
        if context.cached is not None:
            y_BTHK = self._attend_cached(q_BTHK, k_BTGK, v_BTGK, context.cached)
        elif context.documents is not None:
            y_BTHK = torch.cat(
                [
                    _attend_causal(q_BTHK[:, d], k_BTGK[:, d], v_BTGK[:, d])
                    for d in context.documents
                ],
                dim=1,
            )
        else:
            y_BTHK = _attend_causal(q_BTHK, k_BTGK, v_BTGK)
        return self.o_proj(y_BTHK.flatten(-2))

    def _attend_cached(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cached: CachedKeys
    ) -> Tensor:
        B, T = q_BTHK.shape[:2]
        S = cached.mask_BTS.shape[-1]
        cache, rows_B1 = cached.cache, torch.arange(B, device=q_BTHK.device)[:, None]
        k_BGSK, v_BGSK = cache.k_LBGSK[self.layer], cache.v_LBGSK[self.layer]
        k_BGSK[rows_B1, :, cached.positions_BT] = k_BTGK
        v_BGSK[rows_B1, :, cached.positions_BT] = v_BTGK
        # The H / G heads of a group become rows of one query block, so keys are never repeated.
        q = q_BTHK.transpose(1, 2).reshape(B, self.G, -1, self.K)
        group = self.H // self.G
        mask = cached.mask_BTS[:, None].expand(B, group, T, S).reshape(B, 1, group * T, S)
        y = F.scaled_dot_product_attention(q, k_BGSK[:, :, :S], v_BGSK[:, :, :S], attn_mask=mask)
        return y.reshape(B, self.H, T, self.K).transpose(1, 2)


def _attend_causal(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU MLP; the rows of gate_up_proj are gate 0:F, then up F:2F."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.model_dim, 2 * config.mlp_dim)
        self.down_proj = Linear(config.mlp_dim, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.model_dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.model_dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.model_dim, config.norm_eps)


class Phi4Mini(nn.Module):
    """Phi-4-Mini with torch's default weights until `init_weights` or `load_state_dict`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.model_dim, config.vocab_size)

    @property
    def head_weight_VD(self) -> Tensor:
        return (self.model.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor
        | None = None,  # (T,) or (B, T), for rope only; the default depends on the way of calling
        cu_seqlens: Tensor
        | list[int]
        | None = None,  # document starts, then T: [0, ..., T]; B is 1
        cache: KVCache | None = None,  # extended in place
    ) -> Tensor:
        """Return hidden_BTD after the last norm; `logits` turns it into scores."""
        context = self._context(tokens_BT, positions, cu_seqlens, cache)
        x_BTD = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, context)
        if cache is not None:
            cache.lengths_B = cache.lengths_B + tokens_BT.shape[1]
            cache.longest += tokens_BT.shape[1]
        return self.model.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        return linear(hidden, self.head_weight_VD)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        for name, weight in initial_weights(self.config, seed):
            self.get_parameter(name).copy_(weight)

    def _context(
        self,
        tokens_BT: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | list[int] | None,
        cache: KVCache | None,
    ) -> Context:
        B, T = tokens_BT.shape
        device = tokens_BT.device
        own_positions = torch.arange(T, device=device)
        longest, documents, cached = T, None, None
        if cu_seqlens is not None and cache is not None:
            raise ValueError("Phi4Mini: expected cu_seqlens or cache, got both")
        if cu_seqlens is not None:
            documents = _documents(cu_seqlens, B, T)
            lengths = [d.stop - d.start for d in documents]
            longest = max(lengths)
            own_positions = torch.cat([own_positions[:n] for n in lengths])
        if cache is not None:
            longest = cache.longest + T
            own_positions = cache.lengths_B[:, None] + own_positions
            cached = CachedKeys(
                cache, own_positions, self._cache_mask(cache, own_positions, longest)
            )
        if longest > self.config.max_positions:
            raise ValueError(
                f"Phi4Mini: expected at most max_positions = {self.config.max_positions} tokens, got {longest}"
            )
        dtype = torch.promote_types(self.head_weight_VD.dtype, torch.float32)
        cos, sin = rope_at(self.config, own_positions if positions is None else positions, dtype)
        return Context(cos[..., None, :], sin[..., None, :], documents, cached)

    def _cache_mask(self, cache: KVCache, positions_BT: Tensor, longest: int) -> Tensor:
        """Return the mask (B, T, S) with S = longest: keys up to the query's position are visible."""
        capacity = cache.k_LBGSK.shape[3]
        if longest > capacity:
            raise ValueError(
                f"KVCache: expected at most capacity = {capacity} tokens, got {longest}"
            )
        keys_S = torch.arange(longest, device=positions_BT.device)
        mask_BTS = cache.k_LBGSK.new_zeros(*positions_BT.shape, longest)
        return mask_BTS.masked_fill_(keys_S > positions_BT[..., None], -torch.inf)


def initial_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) one at a time: normal(0, initializer_range).

    Drawn on the CPU, so the same for every device. Projections into the residual stream are scaled by 1/sqrt(2L)
    (GPT-2's rule). Norms are ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = [(name, p.shape) for name, p in Phi4Mini(config).named_parameters()]
    for name, shape in shapes:
        if len(shape) == 1:
            yield name, torch.ones(shape)
            continue
        std = config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_layers)
        yield name, torch.randn(shape, generator=generator) * std


def _documents(cu_seqlens: Tensor | list[int], batch: int, num_tokens: int) -> list[slice]:
    cuts = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    rising = all(a < b for a, b in zip(cuts[:-1], cuts[1:], strict=True))
    if batch != 1 or len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != num_tokens or not rising:
        raise ValueError(
            f"Phi4Mini: expected one row (B = 1) and cu_seqlens rising from 0 to T = {num_tokens}, "
            f"got B = {batch} and {cuts}"
        )
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
