"""Bench cases of RoPE on the fused qkv: timed, compiled and counted at the presets' shapes."""

import torch
from torch import Tensor

from phimini.bench.ops.cases import StaticCase, TrafficCase, liger_is_installed
from phimini.bench.ops.harness import Case
from phimini.kernels import rope, rope_reference
from phimini.kernels.rope import _rope_kernel, launch_config
from phimini.model.config import ModelConfig, preset


def _tables(config: ModelConfig, num_positions: int, device: str) -> tuple[Tensor, Tensor]:
    R = config.rotary_dim
    frequencies = config.rope_theta ** (-torch.arange(0, R, 2, device=device) / R)
    angles = torch.outer(torch.arange(num_positions, device=device), frequencies)
    return angles.cos(), angles.sin()


# --- timed -----------------------------------------------------------------------------------------
def timed_cases(device: str, quick: bool) -> list[Case]:
    """Return packed rows, whose positions restart every 1,024 tokens."""
    if device == "cuda":
        lengths = [16384] if quick else [2048, 16384, 65536]
        return [_case(preset("phi-4-mini"), L, device, torch.bfloat16) for L in lengths]
    lengths = [2048] if quick else [2048, 8192]
    return [_case(preset("tiny"), L, device, torch.float32) for L in lengths]


def _case(config: ModelConfig, L: int, device: str, dtype: torch.dtype) -> Case:
    H, G, K, R = config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim
    cos, sin = _tables(config, 1024, device)
    positions = torch.arange(L, device=device) % 1024

    def apart(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split([H // G, 1, 1], dim=-2)
        return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)

    def wide_tables() -> tuple[Tensor, ...]:
        return tuple(torch.cat([t[positions]] * 2, dim=-1).to(dtype) for t in (cos, sin))

    def eager(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = apart(qkv)
        c, s = (t[:, None] for t in wide_tables())
        return _rotate_half(q, c, s, R), _rotate_half(k, c, s, R), v

    providers = {
        "phimini": lambda qkv: rope(qkv, cos, sin, positions),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    if device == "cuda" and liger_is_installed():
        from liger_kernel.ops.rope import LigerRopeFunction

        def liger(qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (x[None] for x in apart(qkv))
            c, s = (t[None] for t in wide_tables())
            q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), c, s)
            return q.transpose(1, 2)[0], k.transpose(1, 2)[0], v[0]

        providers["liger"] = liger
    qkv = torch.randn(L, G, H // G + 2, K, device=device, dtype=dtype)
    moved = 2 * qkv.numel() * qkv.element_size()
    return Case(
        op="rope",
        shape={"L": L, "H": H, "G": G, "K": K, "R": R},
        inputs={"qkv": qkv},
        providers=providers,
        reference=lambda qkv: rope_reference(qkv, cos, sin, positions),
        min_bytes={"fwd": moved, "bwd": moved},
        min_flops={"fwd": 3 * L * (H + G) * R, "bwd": 3 * L * (H + G) * R},
    )


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor, R: int) -> Tensor:
    """Return the rotated halves, as in `apply_rotary_pos_emb` of transformers' Phi-3."""
    rotated, passed = x[..., :R], x[..., R:]
    half = torch.cat([-rotated[..., R // 2 :], rotated[..., : R // 2]], dim=-1)
    return torch.cat([rotated * cos + half * sin, passed], dim=-1)


# --- compiled --------------------------------------------------------------------------------------
def static_cases() -> list[StaticCase]:
    """Return both GPU presets."""
    cases = []
    for name in ("phi-4-mini", "phi-400m"):
        p = preset(name)
        G = p.num_kv_heads
        blocks = launch_config(G, p.num_heads // G + 2, p.head_dim, p.rotary_dim)
        num_warps = blocks.pop("num_warps")
        cases += [
            StaticCase(
                kernel=f"rope_{'bwd' if join else 'fwd'}",
                function=_rope_kernel,
                signature={
                    "qkv_ptr": "*bf16", "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16",
                    "cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64", "stride_q_l": "i32:16",
                    "stride_k_l": "i32:16", "stride_v_l": "i32:16", "stride_cos_p": "i32:16", "stride_sin_p": "i32:16",
                },
                constexprs={**blocks, "JOIN": join},
                num_warps=num_warps,
                max_registers={80: 48, 90: 48, 100: 48},
            )
            for join in (False, True)
        ]  # fmt: skip
    return cases


def peer_static_cases() -> list[StaticCase]:
    """Return Liger 0.8.5 for Phi-4-Mini's heads, as its launch code sets it (triton's default of 4 warps)."""
    if not liger_is_installed():
        return []
    from liger_kernel.ops import rope as liger

    return [
        StaticCase(
            kernel=f"rope_{'bwd' if backward else 'fwd'}",
            provider="liger",
            function=liger._triton_rope,
            signature={
                "q_ptr": "*bf16", "q_row_stride": "i32:16", "k_ptr": "*bf16", "k_row_stride": "i32:16",
                "cos": "*bf16", "cos_row_stride": "i32:16", "sin": "*bf16", "sin_row_stride": "i32:16",
                "sl": "i32",
            },
            constexprs={
                "bs": 1, "cos_bs": 1, "n_qh": 24, "n_kh": 8, "hd": 128, "pad_n_qh": 32, "pad_n_kh": 8,
                "pad_hd": 128, "pad_rd": 128, "rd": 96, "BLOCK_SIZE": 32, "BACKWARD_PASS": backward,
            },
            num_warps=4,
        )
        for backward in (False, True)
    ]  # fmt: skip


# --- counted ---------------------------------------------------------------------------------------
def traffic_cases() -> list[TrafficCase]:
    """Return Phi-4-Mini's heads. Liger rotates q and k in place, as slices of the fused projection (its Phi-3 layer)."""
    config, L = preset("phi-4-mini"), 16
    H, G, K, R = config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim
    tables = (*_tables(config, L, "cpu"), torch.arange(L))
    qkv = torch.randn(L, G, H // G + 2, K).bfloat16()
    grads = [torch.randn(L, heads, K).bfloat16() for heads in (H, G, G)]
    minimum = 2 * qkv.numel() * 2 + 2 * L * (R // 2) * 4 + 8 * L
    cases = [
        TrafficCase(
            kernel="rope_fwd",
            run=lambda: torch.ops.phimini.rope_fwd(qkv, *tables),
            minimum_bytes=minimum,
        ),
        TrafficCase(
            kernel="rope_bwd",
            run=lambda: torch.ops.phimini.rope_bwd(*grads, *tables),
            minimum_bytes=minimum,
        ),
    ]
    if liger_is_installed():
        from liger_kernel.ops.rope import rope_forward

        wide_cos, wide_sin = (torch.cat([t, t], dim=-1).bfloat16() for t in tables[:2])

        def liger() -> None:
            q, k = (
                t[None].transpose(1, 2) for t in qkv.view(L, -1, K).split([H, G, G], dim=-2)[:2]
            )
            rope_forward(q, k, wide_cos, wide_sin)

        cases.append(
            TrafficCase(kernel="rope_fwd", provider="liger", run=liger, minimum_bytes=minimum)
        )
    return cases
