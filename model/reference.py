"""Phi-4-Mini, readable and single-device: the definition that every other implementation is held to.

B batch, T tokens, D model width, H query heads, G key/value heads, K head size, F MLP width, V vocabulary,
S cached tokens, L layers, R rotary size. Parameter names are Hugging Face's (`Phi3ForCausalLM`), so state dicts
interchange. Norms and rope angles are computed in fp32 (fp64 for an fp64 model).

Three ways to call `forward`:
- plain: rows of one length, or right-padded rows of mixed lengths. Attention is causal, so a real token never
  sees the padding after it and needs no mask; what comes out at the padding is to be ignored.
- packed: one row of several documents with their boundaries in `cu_seqlens`; positions restart at each.
- cached: the tokens continue each row of a `KVCache` from that row's own length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phimini.model.config import ModelConfig
from phimini.model.rope import apply_rope, rope_at


class KVCache:
    """Keys and values of every layer for B rows, each row with its own length.

    Token t of a row is stored at index t, so a key is visible exactly when its index is at most the query's
    position; slots beyond a row's length hold leftovers that the mask hides and the next tokens overwrite.
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
        # Zeros: a hidden slot still meets its weight of 0 in a product, and 0 * NaN is NaN.
        self.k_LBGSK = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSK = torch.zeros(shape, device=device, dtype=dtype)
        self.rows_B1 = torch.arange(batch, device=device)[:, None]
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0
        """max(lengths_B), known without asking the device"""

    def set_lengths(self, lengths: list[int]) -> None:
        """Forgets what each row holds beyond its length: used after a right-padded prefill."""
        self.lengths_B = torch.tensor(lengths, device=self.lengths_B.device)
        self.longest = max(lengths)

    def keep_first(self, num_rows: int) -> None:
        """Drops the rows from `num_rows` on, without copying."""
        self.k_LBGSK, self.v_LBGSK = self.k_LBGSK[:, :num_rows], self.v_LBGSK[:, :num_rows]
        self.rows_B1, self.lengths_B = self.rows_B1[:num_rows], self.lengths_B[:num_rows]

    def move_row(self, source: int, target: int) -> None:
        """Copies one row's keys, values and length over another's."""
        live = slice(0, self.longest)
        self.k_LBGSK[:, target, :, live] = self.k_LBGSK[:, source, :, live]
        self.v_LBGSK[:, target, :, live] = self.v_LBGSK[:, source, :, live]
        self.lengths_B[target] = self.lengths_B[source]


class Context:
    """What one forward call tells every layer: rope tables, and which keys each query may see."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos[..., None, :], sin[..., None, :]  # one table for all heads
        self.documents: list[int] | None = None
        self.cache: KVCache | None = None
        self.positions_BT = torch.empty(0)
        self.mask_BTS = torch.empty(0)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps).to(x_BTD.dtype)


class Attention(nn.Module):
    """Grouped-query attention: query head h reads key/value head h // (H / G)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.H, self.G, self.K = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.model_dim, (self.H + 2 * self.G) * self.K, bias=False)
        self.o_proj = nn.Linear(self.H * self.K, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        heads = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.K))
        qk, v_BTGK = heads.split([self.H + self.G, self.G], dim=-2)
        q_BTHK, k_BTGK = apply_rope(qk, context.cos, context.sin).split([self.H, self.G], dim=-2)
        if context.cache is not None:
            y_BTHK = self._attend_cached(q_BTHK, k_BTGK, v_BTGK, context, context.cache)
        elif context.documents is not None:
            cuts = context.documents
            y_BTHK = torch.cat(
                [
                    _attend_causal(q_BTHK[:, a:b], k_BTGK[:, a:b], v_BTGK[:, a:b])
                    for a, b in zip(cuts[:-1], cuts[1:], strict=True)
                ],
                dim=1,
            )
        else:
            y_BTHK = _attend_causal(q_BTHK, k_BTGK, v_BTGK)
        return self.o_proj(y_BTHK.flatten(-2))

    def _attend_cached(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, context: Context, cache: KVCache
    ) -> Tensor:
        B, T = q_BTHK.shape[:2]
        S = context.mask_BTS.shape[-1]
        k_BGSK, v_BGSK = cache.k_LBGSK[self.layer], cache.v_LBGSK[self.layer]
        k_BGSK[cache.rows_B1, :, context.positions_BT] = k_BTGK
        v_BGSK[cache.rows_B1, :, context.positions_BT] = v_BTGK
        # The H / G heads of a group become rows of one query block, so keys are never repeated.
        q = q_BTHK.transpose(1, 2).reshape(B, self.G, -1, self.K)
        group = self.H // self.G
        mask = context.mask_BTS[:, None].expand(B, group, T, S).reshape(B, 1, group * T, S)
        y = F.scaled_dot_product_attention(q, k_BGSK[:, :, :S], v_BGSK[:, :, :S], attn_mask=mask)
        return y.reshape(B, self.H, T, self.K).transpose(1, 2)


def _attend_causal(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU; the rows of gate_up_proj are gate 0:F, then up F:2F."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.model_dim, 2 * config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.model_dim, bias=False)

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
    """Weights are torch's defaults until `init_weights` or `load_state_dict`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)

    @property
    def head_weight_VD(self) -> Tensor:
        return (self.model.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor
        | None = None,  # (T,) or (B, T), for rope only; default: as the three ways say
        cu_seqlens: Tensor
        | list[int]
        | None = None,  # document starts, then T: [0, ..., T]; B is 1
        cache: KVCache | None = None,  # extended in place
    ) -> Tensor:
        """-> hidden_BTD after the last norm; `logits` turns it into scores."""
        context = self._context(tokens_BT, positions, cu_seqlens, cache)
        x_BTD = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, context)
        if cache is not None:
            cache.lengths_B = cache.lengths_B + tokens_BT.shape[1]
            cache.longest += tokens_BT.shape[1]
        return self.model.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return F.linear(hidden, self.head_weight_VD)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, initializer_range), drawn on the CPU so that every device gets the same numbers.

        Projections into the residual stream are scaled by 1/sqrt(2L) (GPT-2's rule), norms are ones.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            p.copy_(torch.randn(p.shape, generator=generator) * std)

    def _context(
        self,
        tokens_BT: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | list[int] | None,
        cache: KVCache | None,
    ) -> Context:
        B, T = tokens_BT.shape
        device = tokens_BT.device
        columns_T = torch.arange(T, device=device)
        if cu_seqlens is not None and cache is not None:
            raise ValueError("Phi4Mini: expected cu_seqlens or cache, got both")
        cuts = None if cu_seqlens is None else _document_cuts(cu_seqlens, B, T)
        if positions is None:
            if cache is not None:
                positions = cache.lengths_B[:, None] + columns_T
            elif cuts is not None:
                positions = torch.cat(
                    [columns_T[: b - a] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
                )
            else:
                positions = columns_T
        longest = T if cache is None else cache.longest + T
        if longest > self.config.max_positions:
            raise ValueError(
                f"Phi4Mini: expected at most max_positions = {self.config.max_positions} tokens, got {longest}"
            )
        dtype = torch.promote_types(self.head_weight_VD.dtype, torch.float32)
        context = Context(*rope_at(self.config, positions, dtype))
        context.documents = cuts
        if cache is not None:
            if longest > cache.k_LBGSK.shape[3]:
                raise ValueError(
                    f"KVCache: expected at most capacity = {cache.k_LBGSK.shape[3]} tokens, got {longest}"
                )
            context.cache = cache
            context.positions_BT = cache.lengths_B[:, None] + columns_T
            hidden_BTS = torch.arange(longest, device=device) > context.positions_BT[..., None]
            context.mask_BTS = torch.zeros(
                hidden_BTS.shape, device=device, dtype=self.head_weight_VD.dtype
            ).masked_fill_(hidden_BTS, -torch.inf)
        return context


def _document_cuts(cu_seqlens: Tensor | list[int], batch: int, num_tokens: int) -> list[int]:
    cuts = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    rising = all(a < b for a, b in zip(cuts[:-1], cuts[1:], strict=True))
    if batch != 1 or len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != num_tokens or not rising:
        raise ValueError(
            f"Phi4Mini: expected one row (B = 1) and cu_seqlens rising from 0 to T = {num_tokens}, "
            f"got B = {batch} and {cuts}"
        )
    return cuts
