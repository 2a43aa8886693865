"""Every block kernel against the formula: out, lse, and gradients for the out and lse of the whole attention.

flash-attn runs on no CPU: its calls are bound to signatures recorded from its source (flash_attn_recorded.json) and
answered by the formula, under the assertions that its C++ makes (csrc/flash_attn/flash_api.cpp).
"""

import ast
import inspect
from collections.abc import Callable

import pytest
import torch
from numerics import DEVICE
from recorded_attention import (
    RECORDED,
    SCALE,
    bound,
    formula,
    formula_backward,
    recorded_backward,
    recorded_forward,
)
from torch import Tensor

from phimini.kernels.backend import launch
from phimini.parallel.attention import blocks as attention_blocks
from phimini.parallel.attention.blocks import CPU, FLASH_ATTN, TORCH_FLASH, BlockKernel, kernel_for
from phimini.parallel.attention.context_parallel import Block, _block
from phimini.parallel.training.batch import mapped, to_device

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
    return to_device(_block(*sides, queries, keys or queries, keys is None), torch.device(DEVICE))


def inputs_of(block: Block, dtype: torch.dtype, head_dim: int = 32) -> list[Tensor]:
    """Return q, k, v, dout, and out and lse of the other keys; k and v are views, as in the ring."""
    n, m = block.query_end, block.key_end
    kv = torch.randn(m, 2, 2 * head_dim, device=DEVICE, dtype=dtype)
    q, dout, other = (torch.randn(n, 6, head_dim, device=DEVICE, dtype=dtype) for _ in range(3))
    return [q, *kv.chunk(2, -1), dout, other, torch.randn(6, n, device=DEVICE)]


def errors(kernel: BlockKernel, block: Block, dtype: torch.dtype, head_dim: int = 32) -> dict:
    """Return the largest |got - want| of each result."""
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
    """Schema and shapes on the meta device, because the kernel exists only in CUDA builds."""
    block = mapped(lambda x: x.to("meta"), _block((0, 5), (0, 7), [5], [7], False))
    q, k, v = (torch.empty(n, h, 32, device="meta", dtype=torch.bfloat16) for n, h in ((5, 6), (7, 2), (7, 2)))  # fmt: skip
    out, lse = TORCH_FLASH.forward(q, k, v, block, SCALE)
    assert out.shape == q.shape and lse.shape == (6, 5) and lse.dtype == torch.float32
    gradients = TORCH_FLASH.backward(out, q, k, v, out, lse, block, SCALE)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_which_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_for(torch.zeros(1)) is CPU
    monkeypatch.setattr(launch, "stand_in", lambda _: True)
    monkeypatch.setattr(attention_blocks, "_flash_attn_varlen_forward", None)
    assert kernel_for(torch.zeros(1)) is TORCH_FLASH
    monkeypatch.setattr(attention_blocks, "_flash_attn_varlen_forward", recorded_forward)
    assert kernel_for(torch.zeros(1)) is FLASH_ATTN


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
    """Return [name, required] of every parameter; flash_attn_recorded.json was made with it."""
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
