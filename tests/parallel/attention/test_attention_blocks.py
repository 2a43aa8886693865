"""Every block kernel against the formula: out and lse of a block's keys, gradients given the whole attention's out and lse.

flash-attn runs on no CPU: its calls are bound to signatures recorded from its source (flash_attn_recorded.json) and
answered by the formula, under the assertions that its C++ makes (csrc/flash_attn/flash_api.cpp).
"""

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import DEVICE
from torch import Tensor

from phimini.parallel.attention import blocks as attention_blocks
from phimini.parallel.attention.blocks import CPU, FLASH_ATTN, TORCH_FLASH, BlockKernel, kernel_for
from phimini.parallel.attention.context_parallel import Block, _block

RECORDED = json.loads((Path(__file__).parent / "flash_attn_recorded.json").read_text())
SCALE = 0.2


def formula(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    """out (n, H, K) and lse (H, n), written out, in q's dtype."""
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    cuts = zip(block.query_cuts.diff().tolist(), block.key_cuts.diff().tolist(), strict=True)
    query_lengths, key_lengths = zip(*cuts, strict=True)
    parts = q.split(query_lengths), k.split(key_lengths), v.split(key_lengths)
    for qi, ki, vi in zip(*parts, strict=True):
        ki, vi = (x.repeat_interleave(group, 1) for x in (ki, vi))
        scores = torch.einsum("qhk,shk->hqs", qi, ki) * scale
        if block.causal:
            hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(ki) - len(qi) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqs,shk->qhk", scores.softmax(-1), vi))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def formula_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients, by autograd: of its attention weighted by its share of the whole sum.

    d(whole out) = share * d(block out) + share * (block out - whole out) d(block lse)
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        block_out, block_lse = formula(q, k, v, block)
        share = (block_lse.detach() - lse).exp()
        weight = (dout * (block_out.detach() - out)).sum(-1).T
        total = (dout * share.T[..., None] * block_out).sum() + (share * weight * block_lse).sum()
    dq, dk, dv = torch.autograd.grad(total, (q, k, v))
    return dq, dk, dv


BLOCKS = {
    "causal": ([3, 1, 9, 1, 2], None),
    "causal-one": ([16], None),
    "rectangle": ([5], [11]),
    "one-key": ([16], [1]),
    "one-query": ([1], [16]),
}


def block_of(name: str) -> Block:
    queries, keys = BLOCKS[name]
    sides = (0, sum(queries)), (0, sum(keys or queries))
    return _block(*sides, queries, keys or queries, keys is None, torch.device(DEVICE))


def inputs_of(block: Block, dtype: torch.dtype, head_dim: int = 32) -> list[Tensor]:
    """q, k, v, dout and the rest of the attention's out and lse; k and v are views, as in the ring."""
    n, m = block.query_end, block.key_end
    kv = torch.randn(m, 2, 2 * head_dim, device=DEVICE, dtype=dtype)
    q, dout, other = (torch.randn(n, 6, head_dim, device=DEVICE, dtype=dtype) for _ in range(3))
    return [q, *kv.chunk(2, -1), dout, other, torch.randn(6, n, device=DEVICE)]


def errors(kernel: BlockKernel, block: Block, dtype: torch.dtype, head_dim: int = 32) -> dict:
    """|got - want|, largest of each result."""
    q, k, v, dout, other, other_lse = inputs_of(block, dtype, head_dim)
    exact = q.double(), k.double(), v.double()
    want_out, want_lse = formula(*exact, block)
    lse = torch.logaddexp(want_lse, other_lse.double())
    shares = [(x - lse).exp().T[..., None] for x in (want_lse, other_lse)]
    whole = shares[0] * want_out + shares[1] * other
    want = [want_out, want_lse, *formula_backward(dout.double(), *exact, whole, lse, block)]
    # As in the ring: rows of a longer lse.
    rows = torch.cat((lse.float(), lse.float()), 1)[:, : lse.shape[1]]
    out, block_lse = kernel.forward(q, k, v, block, SCALE)
    assert block_lse.dtype == torch.float32 and block_lse.shape == (6, len(q))
    gradients = kernel.backward(dout, q, k, v, whole.to(dtype), rows, block, SCALE)
    got = [out, block_lse, *gradients]
    assert [g.shape for g in got] == [w.shape for w in want]
    names = ("out", "lse", "dq", "dk", "dv")
    return {
        n: (g - w).abs().max() / w.abs().max().clamp(min=1)
        for n, g, w in zip(names, got, want, strict=True)
    }


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's kernel")
def test_the_cpu_s_kernel_is_the_formula(name: str) -> None:
    for result, error in errors(CPU, block_of(name), torch.float32).items():
        assert error <= 2e-6, f"{result}: {error:.1e}"


# --- flash-attn, without a GPU -------------------------------------------------------------------
def recorded(name: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(p, kind, default=inspect.Parameter.empty if needed else None)
            for p, needed in RECORDED["signatures"][name]
        ]
    )


def bound(name: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The call's arguments by name, checked as mha_varlen_fwd and mha_varlen_bwd check them."""
    a = recorded(name).bind(*args, **kwargs).arguments
    q, k, v = a["q"], a["k"], a["v"]
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
    assert a["cu_seqlens_q"].dtype == a["cu_seqlens_k"].dtype == torch.int32
    assert a["cu_seqlens_q"][-1] == len(q) and a["cu_seqlens_k"][-1] == len(k) == len(v)
    assert a["max_seqlen_q"] >= a["cu_seqlens_q"].diff().max()
    assert a["max_seqlen_k"] >= a["cu_seqlens_k"].diff().max()
    assert a["dropout_p"] == 0.0 and a.get("softcap", 0.0) == 0.0
    assert a.get("window_size_left", -1) == a.get("window_size_right", -1) == -1
    assert a.get("alibi_slopes") is None
    return a


def block_in(a: dict[str, Any]) -> Block:
    lengths = tuple(a["cu_seqlens_q"].diff().tolist())
    ends = a["cu_seqlens_q"], a["cu_seqlens_k"], a["max_seqlen_q"], a["max_seqlen_k"]
    return Block(0, len(a["q"]), 0, len(a["k"]), *ends, a["causal"], lengths)


def recorded_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flash_attn 2.8's `_flash_attn_varlen_forward`: out, softmax_lse (H, total q), S_dmask, rng_state."""
    a = bound("_flash_attn_varlen_forward", args, kwargs)
    out, lse = formula(a["q"], a["k"], a["v"], block_in(a), a["softmax_scale"])
    return out, lse.float().contiguous(), torch.empty(0), torch.zeros(2, dtype=torch.int64)


def recorded_backward(*args: Any, **kwargs: Any) -> Tensor:
    """flash_attn 2.8's `_flash_attn_varlen_backward`: fills dq, dk, dv; returns softmax_d."""
    a = bound("_flash_attn_varlen_backward", args, kwargs)
    lse, block = a["softmax_lse"], block_in(a)
    assert lse.dtype == torch.float32 and lse.is_contiguous(), "the kernel reads lse by its address"
    assert lse.shape == (a["q"].shape[1], len(a["q"])) and a["out"].dtype == a["dout"].dtype
    assert a["deterministic"] is False and a["softmax_scale"] == SCALE
    dout, q, k, v, out = (a[name].double() for name in ("dout", "q", "k", "v", "out"))
    gradients = formula_backward(dout, q, k, v, out, lse.double(), block)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert a[name].is_contiguous() and a[name].dtype == a["q"].dtype
        a[name].copy_(gradient)
    return torch.empty(0)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "_flash_attn_varlen_forward", recorded_forward)
    monkeypatch.setattr(attention_blocks, "_flash_attn_varlen_backward", recorded_backward)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.skipif(DEVICE == "cuda", reason="the real one is there")
def test_flash_attn_gets_what_its_source_asks_for(name: str, flash_attn: None) -> None:
    for result, error in errors(FLASH_ATTN, block_of(name), torch.float32).items():
        assert error <= 2e-6, f"{result}: {error:.1e}"


def test_torch_s_flash_kernel_takes_our_arguments() -> None:
    """Its schema and shapes, on the meta device: the kernel itself is in CUDA builds only."""
    block = _block((0, 5), (0, 7), [5], [7], False, torch.device("meta"))
    q, k, v = (torch.empty(n, h, 32, device="meta", dtype=torch.bfloat16) for n, h in ((5, 6), (7, 2), (7, 2)))  # fmt: skip
    out, lse = TORCH_FLASH.forward(q, k, v, block, SCALE)
    assert out.shape == q.shape and lse.shape == (6, 5) and lse.dtype == torch.float32
    gradients = TORCH_FLASH.backward(out, q, k, v, out, lse, block, SCALE)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_which_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_for(torch.device("cpu")) is CPU
    monkeypatch.setattr(attention_blocks, "_flash_attn_varlen_forward", None)
    assert kernel_for(torch.device("cuda")) is TORCH_FLASH
    monkeypatch.setattr(attention_blocks, "_flash_attn_varlen_forward", recorded_forward)
    assert kernel_for(torch.device("cuda")) is FLASH_ATTN


# --- on a GPU ------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKS)
def test_flash_blocks_match_the_formula_on_a_gpu(name: str) -> None:
    kernels: dict[str, BlockKernel] = {"torch": TORCH_FLASH}
    if attention_blocks._flash_attn_varlen_forward is not None:
        kernels["flash-attn"] = FLASH_ATTN
    for kernel_name, kernel in kernels.items():
        for result, error in errors(kernel, block_of(name), torch.bfloat16, 128).items():
            assert error <= 2**-6, f"{kernel_name} {result}: {error:.1e}"


@pytest.mark.gpu
def test_the_installed_flash_attn_has_the_recorded_signatures() -> None:
    import flash_attn.flash_attn_interface as installed  # pyright: ignore[reportMissingImports]

    assert signatures_in(inspect.getsource(installed)) == RECORDED["signatures"]


def signatures_in(source: str) -> dict[str, list]:
    """[name, whether it must be given] of every parameter; how flash_attn_recorded.json was made."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in RECORDED["signatures"]:
            needed = len(node.args.args) - len(node.args.defaults)
            found[node.name] = [[a.arg, i < needed] for i, a in enumerate(node.args.args)]
    return found


def test_a_call_that_the_recorded_signature_refuses_is_seen() -> None:
    with pytest.raises(TypeError, match="missing a required argument"):
        bound("_flash_attn_varlen_backward", (torch.zeros(1),), {})


BROKEN: dict[str, Callable[[BlockKernel], BlockKernel]] = {
    "own lse": lambda kernel: kernel._replace(
        backward=lambda dout, q, k, v, out, lse, block, scale: kernel.backward(
            dout, q, k, v, out, kernel.forward(q, k, v, block, scale)[1], block, scale
        )
    ),
    "own out": lambda kernel: kernel._replace(
        backward=lambda dout, q, k, v, out, lse, block, scale: kernel.backward(
            dout, q, k, v, kernel.forward(q, k, v, block, scale)[0], lse, block, scale
        )
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's kernel")
def test_backward_needs_the_whole_attention_s_out_and_lse(broken: str) -> None:
    found = errors(BROKEN[broken](CPU), block_of("rectangle"), torch.float32)
    assert found["dq"] > 0.01, found
