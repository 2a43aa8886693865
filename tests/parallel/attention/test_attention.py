"""Attention over packed documents against the formula, in fp64, document by document."""

import dataclasses
import inspect
import math
import types
from collections.abc import Sequence

import pytest
import torch
from attention_cases import attend_reference, copies, qkv
from numerics import DEVICE
from torch import Tensor

from phimini.model.config import ModelConfig, preset
from phimini.model.rope import apply_rope, rope_at
from phimini.parallel.attention import core as attention
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


def flash_attn_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=1.0,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
) -> Tensor:  # fmt: skip
    """Plain torch with flash-attn 2.8's signature and meaning: the last query sees the last key."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    group, outs = q.shape[1] // k.shape[1], []
    for i in range(len(cu_seqlens_q) - 1):
        qi = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        ki, vi = (
            x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(group, 1) for x in (k, v)
        )
        assert len(qi) <= max_seqlen_q and len(ki) <= max_seqlen_k
        scores = torch.einsum("qhk,shk->hqs", qi, ki) * softmax_scale
        hidden = torch.ones(len(qi), len(ki), dtype=torch.bool).triu(len(ki) - len(qi) + 1)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqs,shk->qhk", p, vi))
    return torch.cat(outs)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_and_cuda_arguments_give_the_whole_attention(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kernels on every context rank's rows with the keys of all ranks, merged without a process group."""
    lengths = [3, 1, 17, 64, 2, 9]
    q, k, v = qkv(96, torch.float32)
    want = attend_reference(q.double(), k.double(), v.double(), lengths, 0.2)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn_varlen)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    seen = []
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
            got = kernel(q[rows], k, v, documents, 0.2)
            assert (got - want[rows]).abs().max() <= 1e-5 * want.abs().max(), (
                kernel.__name__,
                rank,
            )
    assert torch.cat(seen).sort().values.equal(torch.arange(96))


def test_torch_s_own_flash_kernel_takes_our_arguments() -> None:
    """Arguments of the call without flash-attn; the call itself needs a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    x = torch.zeros(4, 2, 8)
    bound = inspect.signature(varlen_attn).bind(
        x, x, x, x, x, 4, 4, scale=1.0, window_size=(-1, 0), enable_gqa=True
    )
    assert list(bound.arguments)[3:7] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]
