"""Attention over packed documents against the formula, in fp64, document by document."""

import dataclasses
import math
import types
from collections.abc import Sequence

import pytest
import torch
from attention_cases import attend_reference, copies, qkv
from numerics import DEVICE
from recorded_attention import RECORDED_FLASH_4
from torch import Tensor

from phimini.model.config import ModelConfig, preset
from phimini.model.rope import apply_rope, rope_at
from phimini.parallel.attention import blocks as attention_blocks
from phimini.parallel.attention import core as attention
from phimini.parallel.attention.blocks import FLASH_4
from phimini.parallel.attention.context_parallel import rows_of_rank
from phimini.parallel.attention.core import PackedDocuments, packed_documents, rotate_and_attend
from phimini.parallel.training.batch import to_device

CONFIG = dataclasses.replace(preset("tiny"), num_heads=6, num_kv_heads=2)
LENGTHS = {
    "one": [7],
    "one-token": [1],
    "ones": [1, 1, 1],
    "mixed": [3, 1, 17, 64, 2],
    "equal": [16] * 5,
    "long": [130],
}


def documents_of(lengths: list[int], config: ModelConfig = CONFIG) -> PackedDocuments:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    documents = to_device(packed_documents(cu_seqlens, config), torch.device(DEVICE))
    documents.rope_tables = attention.rope_tables(
        config, documents.max_seqlen_q, torch.device(DEVICE)
    )
    return documents


def attend(q: Tensor, k: Tensor, v: Tensor, documents: PackedDocuments, scale: float) -> Tensor:
    """Compute attention without the rotation."""
    kernel = attention._attend_cpu if q.device.type == "cpu" else attention._attend_cuda
    return kernel(q, k, v, documents, scale)


def gradients(out: Tensor, dy: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, dy.to(out.dtype))]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.skipif(DEVICE == "cuda", reason="flash kernels take no fp32")
def test_attention_and_gradients_match_the_formula(lengths: list[int]) -> None:
    inputs = qkv(sum(lengths), torch.float32)
    dy = torch.randn(sum(lengths), 6, 32)
    scale = 1 / math.sqrt(32)
    got = gradients(attend(*inputs, documents_of(lengths), scale), dy, inputs)
    exact = copies(inputs, torch.float64)
    want = gradients(attend_reference(*exact, lengths, scale), dy, exact)
    for name, g, w in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        # A document of one token has no gradient for q and k: 1 is the size of the inputs.
        error = (g - w).abs().max() / w.abs().max().clamp(min=1.0)
        assert error <= 1e-5 and g.shape == w.shape, f"{name}: {error:.1e}"


def test_the_fused_projection_is_rotated_and_attended_to() -> None:
    """Against the formula of the rotation, position by position of each document, and of the attention."""
    lengths = [5, 20, 2]
    documents = documents_of(lengths)
    qkv_TGNK = torch.randn(27, 2, 5, 32, device=DEVICE, requires_grad=True)
    dy = torch.randn(27, 6, 32, device=DEVICE)
    got = gradients(rotate_and_attend(qkv_TGNK, documents, 0.2), dy, [qkv_TGNK])
    positions = torch.cat([torch.arange(n) for n in lengths])
    cos, sin = (t[:, None].double().to(DEVICE) for t in rope_at(CONFIG, positions))
    exact = qkv_TGNK.detach().double().requires_grad_()
    q, k, v = exact[:, :, :3].flatten(1, 2), exact[:, :, 3], exact[:, :, 4]
    q, k = (apply_rope(x, cos, sin) for x in (q, k))
    want = gradients(attend_reference(q, k, v, lengths, 0.2), dy, [exact])
    for name, g, w in zip(("y", "dqkv"), got, want, strict=True):
        assert (g - w).abs().max() <= 1e-5 * w.abs().max(), name


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_flash_attention_and_gradients_match_the_formula(lengths: list[int]) -> None:
    inputs = qkv(sum(lengths), torch.bfloat16, 128)
    dy = torch.randn(sum(lengths), 6, 128, device=DEVICE)
    scale = 1 / math.sqrt(128)
    got = gradients(attend(*inputs, documents_of(lengths), scale), dy, inputs)
    exact = copies(inputs, torch.float64)
    want = gradients(attend_reference(*exact, lengths, scale), dy, exact)
    rounded = copies(inputs, torch.bfloat16)
    torch_bf16 = gradients(attend_reference(*rounded, lengths, scale), dy, rounded)
    for name, g, w, t in zip(("y", "dq", "dk", "dv"), got, want, torch_bf16, strict=True):
        limit = 2 * (t - w).abs().max() + (w.bfloat16() - w).abs().max()
        assert (g - w).abs().max() <= limit, f"{name}: {(g - w).abs().max():.1e} > {limit:.1e}"


def test_no_document_sees_another() -> None:
    lengths = [5, 9, 4]
    inputs = qkv(sum(lengths), torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    documents = documents_of(lengths)
    before = attend(*inputs, documents, 0.2)
    with torch.no_grad():
        for x in inputs:
            x[5:14] = torch.nan
    after = attend(*inputs, documents, 0.2)
    assert after[:5].equal(before[:5]) and after[14:].equal(before[14:])
    assert after[5:14].isnan().all()


@pytest.mark.parametrize("rope_factors", ["short", "long"])
def test_tables_are_the_model_s_and_positions_restart_at_each_document(rope_factors) -> None:
    config = dataclasses.replace(CONFIG, rope_factors=rope_factors)
    documents = documents_of([3, 2], config)
    assert documents.rope_tables is not None and documents.positions_T is not None
    assert documents.positions_T.tolist() == [0, 1, 2, 0, 1]
    for got, want in zip(documents.rope_tables, rope_at(config, torch.arange(4)), strict=True):
        assert got.cpu().equal(want)
    assert documents.max_seqlen_q == 3


def test_a_document_longer_than_the_table_is_refused() -> None:
    with pytest.raises(
        ValueError, match="a document of 513 tokens is longer than .* max_positions 512"
    ):
        documents_of([4, 513])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_and_cuda_arguments_give_the_whole_attention(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kernels on every context rank's rows with the keys of all ranks, merged without a process group."""
    lengths = [3, 1, 17, 64, 2, 9]
    q, k, v = inputs = qkv(96, torch.float32)
    dy = torch.randn(96, 6, 32)
    exact = copies(inputs, torch.float64)
    want, *want_gradients = gradients(attend_reference(*exact, lengths, 0.2), dy, exact)
    monkeypatch.setattr(attention_blocks, "_flash_4", lambda: RECORDED_FLASH_4)
    monkeypatch.setattr(attention, "kernel_for", lambda _: FLASH_4)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    seen = []
    sums: dict[str, list[Tensor]] = {}
    for rank in range(size):
        group = types.SimpleNamespace(rank=lambda r=rank: r, size=lambda: size)
        documents = packed_documents(
            cu_seqlens,
            CONFIG,
            group if size > 1 else None,  # pyright: ignore[reportArgumentType]
        )
        rows = rows_of_rank(96, rank, size)
        seen.append(rows)
        for kernel in (attention._attend_cpu, attention._attend_cuda):
            got, *mine = gradients(kernel(q[rows], k, v, documents, 0.2), dy[rows], inputs)
            assert (got - want[rows]).abs().max() <= 1e-5 * want.abs().max(), (
                kernel.__name__,
                rank,
            )
            before = sums.get(kernel.__name__, [torch.zeros(())] * 3)
            sums[kernel.__name__] = [a + b for a, b in zip(before, mine, strict=True)]
    for name, got_gradients in sums.items():
        for g, w in zip(got_gradients, want_gradients, strict=True):
            assert (g - w).abs().max() <= 1e-5 * w.abs().max(), name
    assert torch.cat(seen).sort().values.equal(torch.arange(96))
