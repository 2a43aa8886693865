"""Every block kernel against the formula: out, lse, and gradients for the out and lse of the whole attention.

FlashAttention runs on no CPU: the calls are bound to signatures recorded from its source (flash_attn_recorded.json) and
answered by the formula. Which kernel runs where is a table.
"""

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import DEVICE
from recorded_attention import (
    RECORDED,
    RECORDED_FLASH_4,
    SCALE,
    block_in,
    bound,
    formula,
    formula_backward,
)
from torch import Tensor

from phimini.kernels.backend import launch
from phimini.parallel.attention import blocks as attention_blocks
from phimini.parallel.attention.blocks import (
    CPU,
    FLASH_2,
    FLASH_3,
    FLASH_4,
    BlockKernel,
    kernel_for,
    kernel_of,
)
from phimini.parallel.attention.context_parallel import Block, _block
from phimini.parallel.attention.core import attention_name
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


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.skipif(DEVICE == "cuda", reason="the real one is there")
def test_flash_attn_4_gets_what_its_source_asks_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_blocks, "_flash_4", lambda: RECORDED_FLASH_4)
    for result, error in errors(FLASH_4, block_of(name), torch.float32).items():
        assert error <= 2e-6, f"{result}: {error:.1e}"


def test_torch_s_flash_kernel_takes_our_arguments() -> None:
    """Schema and shapes on the meta device, because the kernel exists only in CUDA builds."""
    block = mapped(lambda x: x.to("meta"), _block((0, 5), (0, 7), [5], [7], False))
    q, k, v = (torch.empty(n, h, 32, device="meta", dtype=torch.bfloat16) for n, h in ((5, 6), (7, 2), (7, 2)))  # fmt: skip
    out, lse = FLASH_2.forward(q, k, v, block, SCALE)
    assert out.shape == q.shape and lse.shape == (6, 5) and lse.dtype == torch.float32
    gradients = FLASH_2.backward(out, q, k, v, out, lse, block, SCALE)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def named(schema: str, args: tuple) -> dict[str, Any]:
    """Return an operator's arguments by name; a dispatcher leaves out the last ones that are defaults."""
    arguments = torch._C.parse_schema(schema).arguments
    given = dict(zip((a.name for a in arguments), args, strict=False))
    a = {a.name: a.default_value for a in arguments} | given
    no_window = a["window_size_left"] == a["window_size_right"] == -1
    assert no_window and a["softcap"] == 0.0
    return a


def answer_forward(*args: Any) -> tuple[Tensor, ...]:
    """Answer flash_attn_3's `fwd` with the formula."""
    a = named(FORWARD, args)
    q = a["q"]
    out, lse = formula(q, a["k"], a["v"], block_in(a | {"causal": a["is_causal"]}), a["softmax_scale"])  # fmt: skip
    return out, lse.float(), q.new_empty(0), q.new_empty(0)


def answer_backward(*args: Any) -> tuple[Tensor, ...]:
    """Answer flash_attn_3's `bwd`, which fills dq, dk and dv, with the formula."""
    a = named(BACKWARD, args)
    assert a["softmax_lse"].is_contiguous()
    dout, q, k, v, out = (a[name].double() for name in ("dout", "q", "k", "v", "out"))
    with ThreadPoolExecutor(1) as thread:  # below a dispatcher there is no autograd on this one
        block = block_in(a | {"causal": a["is_causal"]})
        gradients = thread.submit(
            formula_backward,
            dout,
            q,
            k,
            v,
            out,
            a["softmax_lse"].double(),
            block,
            a["softmax_scale"],
        ).result()
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        a[name].copy_(gradient)
    return tuple(gradient.new_empty(0) for gradient in (*gradients, *gradients[:2]))


FORWARD, BACKWARD = RECORDED["flash_attn_3"]["schemas"]


@pytest.fixture
def flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's bridge to FlashAttention 3 over the recorded schemas, as a CPU's flash kernel."""
    from torch.nn.attention import _fa3

    with torch.library._scoped_library("flash_attn_3", "DEF") as ops:
        for schema, answer in ((FORWARD, answer_forward), (BACKWARD, answer_backward)):
            ops.define(schema)
            ops.impl(schema.split("(")[0], answer, "CPU")
        monkeypatch.setattr(_fa3, "_FA3_CUDA_FWD", torch.ops.flash_attn_3.fwd)
        monkeypatch.setattr(_fa3, "_FA3_CUDA_BWD", torch.ops.flash_attn_3.bwd)
        monkeypatch.setattr(_fa3, "_fa3_forward_support_error", lambda *_: None)
        monkeypatch.setattr(_fa3, "_fa3_backward_support_error", lambda *_: None)
        with torch.library._scoped_library("aten", "IMPL") as aten:
            aten.impl("_flash_attention_forward", _fa3._fa3_flash_attention_forward_impl_default, "CPU")  # fmt: skip
            aten.impl("_flash_attention_backward", _fa3._fa3_flash_attention_backward_impl, "CPU")
            yield


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.skipif(DEVICE == "cuda", reason="the real one may be there")
def test_torch_s_bridge_to_flash_attention_3_fits_its_schema(name: str, flash_attn_3: None) -> None:
    for result, error in errors(FLASH_3, block_of(name), torch.float32).items():
        assert error <= 2e-6, f"{result}: {error:.1e}"


# --- which kernel ----------------------------------------------------------------------------------
NOT_MADE_FOR_IT = "FlashAttention 2, which is not made for this GPU (flash-attn-4 is not installed)"
CHOICES = [
    ((8, 0), {"flash_attn_3", "flash-attn-4"}, FLASH_2, "FlashAttention 2"),
    ((12, 0), {"flash-attn-4"}, FLASH_2, "FlashAttention 2"),
    ((9, 0), {"flash_attn_3", "flash-attn-4"}, FLASH_3, "FlashAttention 3"),
    ((9, 0), {"flash-attn-4"}, FLASH_4, "FlashAttention 4"),
    ((9, 0), set(), FLASH_2, NOT_MADE_FOR_IT),
    ((10, 0), {"flash_attn_3", "flash-attn-4"}, FLASH_4, "FlashAttention 4"),
    ((10, 3), {"flash-attn-4"}, FLASH_4, "FlashAttention 4"),
    ((10, 0), {"flash_attn_3"}, FLASH_2, NOT_MADE_FOR_IT),
]


@pytest.mark.parametrize(("capability", "installed", "kernel", "name"), CHOICES)
def test_the_chip_and_what_is_installed_decide(
    capability: tuple[int, int],
    installed: set[str],
    kernel: BlockKernel,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    activated = []
    kernel_of.cache_clear()
    monkeypatch.setattr(attention_blocks, "is_installed", installed.__contains__)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert kernel_for(torch.zeros(1)) is CPU
    assert attention_name(torch.device("cpu")) == "torch's flash kernel for CPUs"
    monkeypatch.setattr(launch, "stand_in", lambda _: True)
    assert kernel_for(torch.zeros(1)) is kernel
    assert attention_name(torch.device("cuda")) == name
    assert activated == (["FA3"] if kernel is FLASH_3 else [])
    kernel_of.cache_clear()


def test_a_package_is_found_by_its_distribution() -> None:
    assert attention_blocks.is_installed("torch")
    assert not attention_blocks.is_installed("flash-attn-5")


# --- on a GPU ------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKS)
def test_flash_blocks_match_the_formula_on_a_gpu(name: str) -> None:
    for kernel in {FLASH_2, kernel_for(torch.zeros(1, device=DEVICE))}:
        for result, error in errors(kernel, block_of(name), torch.bfloat16, 128).items():
            assert error <= 2**-6, f"{kernel.name} {result}: {error:.1e}"


COMPILE = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from phimini.parallel.attention.blocks import FLASH_4
from phimini.parallel.attention.context_parallel import Block
with FakeTensorMode(), torch.no_grad():
    q, k, v = (torch.empty(16384, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (24, 8, 8))
    cuts = torch.empty(5, dtype=torch.int32, device="cuda")
    for causal in (True, False):
        block = Block(0, 16384, 0, 16384, cuts, cuts, 16384, 16384, causal, ())
        out, lse = FLASH_4.forward(q, k, v, block, 0.1)
        assert lse.shape == (24, 16384)
        gradients = FLASH_4.backward(torch.empty_like(out), q, k, v, out, lse, block, 0.1)
        assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
"""


@pytest.mark.optin
@pytest.mark.skipif(not attention_blocks.is_installed("flash-attn-4"), reason="needs flash-attn-4")
@pytest.mark.parametrize(("target", "num_sms"), [(90, 132), (100, 148)])
def test_flash_attn_4_compiles_for_gpus_that_are_not_there(
    target: int, num_sms: int, tmp_path: Path
) -> None:
    """Phi-4-Mini's heads, forward and backward, whole attention and a ring's rectangle: a cubin for the GPU."""
    variables = {"FLASH_ATTENTION_ARCH": f"sm_{target}", "CUTE_DSL_ARCH": f"sm_{target}a",
                 "FLASH_ATTENTION_NUM_SMS": str(num_sms), "CUTE_DSL_KEEP_CUBIN": "1",
                 "CUTE_DSL_DUMP_DIR": str(tmp_path)}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | variables, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    # One file each: the two kinds of block have one name, cut at the length that a file's name may have.
    assert any(tmp_path.glob(f"*flash_fwd_sm{target}*sm_{target}a.cubin"))
    assert any(tmp_path.glob(f"*flash_bwd_sm{target}*sm_{target}a.cubin"))


@pytest.mark.skipif(not attention_blocks.is_installed("flash-attn-4"), reason="needs flash-attn-4")
def test_the_installed_flash_attn_4_has_the_recorded_signatures() -> None:
    record = RECORDED["flash-attn-4"]
    distribution = importlib.metadata.distribution("flash-attn-4")
    source = Path(str(distribution.locate_file(record["file"]))).read_text()
    assert signatures_in(source) == record["signatures"]


def signatures_in(source: str) -> dict[str, list]:
    """Return [name, required] of every parameter; flash_attn_recorded.json was made with it."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in (
            "_flash_attn_fwd",
            "_flash_attn_bwd",
        ):
            needed = len(node.args.args) - len(node.args.defaults)
            found[node.name] = [[a.arg, i < needed] for i, a in enumerate(node.args.args)]
    return found


def test_a_call_that_the_recorded_signature_refuses_is_seen() -> None:
    with pytest.raises(TypeError, match="missing a required argument"):
        bound("_flash_attn_bwd", (torch.zeros(1),), {})


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
