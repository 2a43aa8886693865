"""Ring attention over gloo ranks against the formula, and the model's losses and gradients against the reference.

The whole layouts with ring and the three fused losses: test_parallel_losses.py (LAYOUTS of test_parallel_parity.py).
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import attend_reference, copies, qkv
from forked_ranks import run_ranks
from parity_cases import (  # noqa: F401
    GROUPS,
    LIMIT,
    check,
    config,
    cross_entropy_head,
    poison_uninitialised_memory,
    reference,
    share_of,
    worst_error,
)
from recorded_attention import RECORDED_FLASH_4
from torch import Tensor

from phimini.parallel.attention import blocks as attention_blocks
from phimini.parallel.attention import ring as ring_attention
from phimini.parallel.attention.blocks import CPU as CPU_KERNEL
from phimini.parallel.attention.blocks import FLASH_4
from phimini.parallel.attention.context_parallel import blocks_of_hop, rows_of_rank
from phimini.parallel.attention.core import packed_documents, rope_tables, rotate_and_attend
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.step import forward_backward

CPU = torch.device("cpu")
SCALE = 0.2


def random_lengths(seed: int, total: int) -> list[int]:
    """Return lengths of 1 token, of any size, and over several ranks' chunks; the last is like padding."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, rng.choice((1, 1, 2, rng.randint(1, 12), rng.randint(1, total)))))
    return lengths


PACKS = [
    [64], [1] * 64, [63, 1], [1, 63], [8] * 8, [16] * 4, [3, 1, 27, 30, 2, 1], [32, 32],
    *(random_lengths(seed, 64) for seed in range(6)),
]  # fmt: skip


# --- which blocks --------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_blocks_are_every_key_that_a_query_sees_once(size: int) -> None:
    for seed in range(40):
        lengths = random_lengths(seed, 48)
        cuts = torch.tensor([0, *lengths]).cumsum(0)
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        token = torch.arange(48)
        want = (documents[:, None] == documents) & (token[:, None] >= token)
        seen = torch.zeros(48, 48, dtype=torch.int64)
        for rank in range(size):
            for source in range(size):
                rows, columns = rows_of_rank(48, rank, size), rows_of_rank(48, source, size)
                blocks = blocks_of_hop(cuts.tolist(), rank, source, size)
                assert len(blocks) <= 1 + (rank == source)
                for b in blocks:
                    queries, keys = rows[b.query_begin : b.query_end], columns[b.key_begin : b.key_end]  # fmt: skip
                    assert len(queries) == b.query_cuts[-1] and len(keys) == b.key_cuts[-1]
                    parts = torch.ones(len(queries), len(keys), dtype=torch.int64)
                    if b.causal:
                        same = torch.repeat_interleave(
                            torch.arange(len(b.part_lengths)), torch.tensor(b.part_lengths)
                        )
                        parts = ((same[:, None] == same).long()).tril()
                    seen[queries[:, None], keys] += parts
        # No key twice, none missing, and nothing computed for a query that does not see it.
        assert seen.equal(want.long()), (lengths, size)


def test_nothing_is_computed_against_the_future() -> None:
    """One long document over 4 ranks: of 4 x 4 chunk pairs of a hop, each rank computes two besides its diagonal."""
    for rank in range(4):
        for source in range(4):
            blocks = blocks_of_hop([0, 64], rank, source, 4)
            pairs = sum(
                len(b.query_cuts.diff()) * 8 * 8 if b.causal
                else (b.query_end - b.query_begin) * (b.key_end - b.key_begin)
                for b in blocks
            )  # fmt: skip
            assert pairs == (2 * 64 if rank != source else 3 * 64)


# --- attention alone -----------------------------------------------------------------------------
def attention_rank(
    size: int, packs: list[list[int]], change: Callable[[], None] | None, flash: bool
) -> list[list[Tensor]]:
    """Return this rank's out, dq, dk, dv of each pack."""
    world = initialize(Layout(context=size, context_keys="ring"), config(), timeout_s=240)
    if change is not None:
        change()
    kernel = CPU_KERNEL
    if flash:
        attention_blocks._flash_4 = lambda: RECORDED_FLASH_4  # pyright: ignore[reportAttributeAccessIssue]
        kernel = FLASH_4
    results = []
    for q, k, v, dy, lengths in (inputs_of(lengths) for lengths in packs):
        rows = rows_of_rank(len(q), world.context_rank, size)
        mine = of_rows(rows, q, k, v)
        cuts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        hops = tuple(
            blocks_of_hop(cuts, world.context_rank, (world.context_rank - h) % size, size)
            for h in range(size)
        )
        out = ring_attention.ring_attention(*mine, hops, world.context_group, SCALE, kernel)
        results.append([out.detach(), *torch.autograd.grad(out, mine, dy[rows])])
    world.close()
    return results


def of_rows(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach()[rows].requires_grad_() for x in (q, k, v))
    return q, k, v


def inputs_of(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    torch.manual_seed(len(lengths))
    total = sum(lengths)
    return *qkv(total, torch.float32), torch.randn(total, 6, 32), lengths


def attention_errors(
    size: int,
    packs: list[list[int]] = PACKS,
    change: Callable[[], None] | None = None,
    flash: bool = False,
) -> list[float]:
    """Return the largest errors of out, dq, dk and dv of each pack, relative to the largest entry."""
    ranks = run_ranks(attention_rank, size, size, packs, change, flash, timeout_s=240)
    worst = []
    for i, lengths in enumerate(packs):
        q, k, v, dy, _ = inputs_of(lengths)
        exact = copies((q, k, v), torch.float64)
        out = attend_reference(*exact, lengths, SCALE)
        want = [out.detach(), *torch.autograd.grad(out, exact, dy.double())]
        rows = torch.cat([rows_of_rank(len(q), rank, size) for rank in range(size)])
        got = [torch.cat([r[i][j] for r in ranks]) for j in range(4)]
        worst.append(
            max(
                float((g - w[rows]).abs().max() / w.abs().max().clamp(min=1))
                for g, w in zip(got, want, strict=True)
            )
        )
    return worst


@pytest.mark.parametrize(
    ("size", "packs"), [(2, PACKS), (4, PACKS), (8, PACKS[6:9])], ids=["cp2", "cp4", "cp8"]
)
def test_attention_and_gradients_match_the_formula(size: int, packs: list[list[int]]) -> None:
    for lengths, error in zip(packs, attention_errors(size, packs), strict=True):
        assert error <= 2e-6, f"{lengths}: {error:.1e}"


def test_the_ring_of_flash_attn_4_s_calls() -> None:
    """The calls on GPUs, with the formula behind the recorded signatures."""
    for lengths, error in zip(PACKS, attention_errors(2, flash=True), strict=True):
        assert error <= 2e-6, f"{lengths}: {error:.1e}"


# Negative controls: each breaks one thing in the forked ranks, and must be seen.
def merge_without_lse() -> None:
    def half(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        out.add_(block_out).div_(2)
        lse.copy_(torch.logaddexp(lse, block_lse))

    ring_attention.merge = half


def keep_the_first_lse() -> None:
    right = ring_attention.merge
    ring_attention.merge = lambda out, lse, *block: right(out, lse.clone(), *block)


def miss_the_last_hop() -> None:
    right = ring_attention._RingAttention.apply
    ring_attention._RingAttention.apply = (
        lambda q, kv, hops, *rest: right(  # pyright: ignore[reportAttributeAccessIssue]
            q, kv, (*hops[:-1], ()), *rest
        )
    )


def go_the_wrong_way() -> None:
    right = ring_attention.dist.P2POp

    def turned(*args: Any, group_peer: int, group: Any, **kwargs: Any) -> Any:
        return right(*args, group=group, group_peer=(2 * group.rank() - group_peer) % group.size(), **kwargs)  # fmt: skip

    ring_attention.dist.P2POp = turned  # pyright: ignore[reportPrivateImportUsage]


def leave_the_gradients_one_rank_short() -> None:
    right = ring_attention._Travelling.receive

    def receive(self: ring_attention._Travelling) -> None:
        before = self.present
        right(self)
        self.calls = getattr(self, "calls", 0) + 1  # pyright: ignore[reportAttributeAccessIssue]
        if self._tag == ring_attention._GRADIENTS and self.calls == self._group.size():  # pyright: ignore[reportAttributeAccessIssue]
            self.present = before

    ring_attention._Travelling.receive = receive


@pytest.mark.parametrize(
    "change",
    [merge_without_lse, keep_the_first_lse, miss_the_last_hop, go_the_wrong_way, leave_the_gradients_one_rank_short],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_broken_ring_is_seen(change: Callable[[], None]) -> None:
    (error,) = attention_errors(4, [[64]], change)
    assert error > 1000 * LIMIT, f"{change.__name__} changed nothing by more than {error:.1e}"


# --- memory --------------------------------------------------------------------------------------
def order_rank() -> list[str]:
    world = initialize(Layout(context=4, context_keys="ring"), config(), timeout_s=240)
    kernel, events = CPU_KERNEL, []

    def noted(name: str, function: Callable) -> Callable:
        return lambda *args: (events.append(name), function(*args))[1]

    ring_attention.pass_on = noted("send", ring_attention.pass_on)
    ring_attention._Travelling.receive = noted("receive", ring_attention._Travelling.receive)
    kernel = kernel._replace(forward=noted("block", kernel.forward))
    q, k, v, _, _ = inputs_of([64])
    mine = of_rows(rows_of_rank(64, world.context_rank, 4), q, k, v)
    sources = [(world.context_rank - hop) % 4 for hop in range(4)]
    hops = tuple(blocks_of_hop([0, 64], world.context_rank, s, 4) for s in sources)
    ring_attention.ring_attention(*mine, hops, world.context_group, SCALE, kernel)
    world.close()
    return events


def test_the_next_transfer_is_under_way_while_a_block_is_computed() -> None:
    hop = ["send", "block", "receive"]
    own = [
        "send",
        "block",
        "block",
        "receive",
    ]  # a causal block, and the late queries with the early keys
    assert run_ranks(order_rank, 4, timeout_s=240) == [[*own, *hop, *hop, "block"]] * 4


def memory_rank(size: int) -> dict[str, Any]:
    world = initialize(Layout(context=size, context_keys="ring"), config(), timeout_s=240)
    right, receives = ring_attention.pass_on, []

    def noted(send: Tensor, receive: Tensor, group: Any, tag: int) -> Any:
        receives.append((tag, receive.data_ptr(), receive.nbytes))
        return right(send, receive, group, tag)

    ring_attention.pass_on = noted
    q, k, v, _, _ = inputs_of([8 * 2 * size])
    rows = rows_of_rank(len(q), world.context_rank, size)
    mine = of_rows(rows, q, k, v)
    cuts = [0, len(q)]
    hops = tuple(
        blocks_of_hop(cuts, world.context_rank, (world.context_rank - h) % size, size)
        for h in range(size)
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = ring_attention.ring_attention(*mine, hops, world.context_group, SCALE, CPU_KERNEL)
    forward, kv_bytes = list(receives), 2 * k.nbytes // size
    receives.clear()
    out.sum().backward()
    world.close()
    return {"forward": forward, "backward": receives, "kv": kv_bytes, "saved": sum(t.nbytes for t in saved),
            "own": 2 * mine[0].nbytes + kv_bytes + 4 * 6 * len(rows)}  # fmt: skip


@pytest.mark.parametrize("size", [4, 8])
def test_no_rank_holds_more_than_two_others_keys(size: int) -> None:
    """Live tensors have different addresses: all received tensors of a rank share two."""
    for found in run_ranks(memory_rank, size, size, timeout_s=240):
        keys = [r for r in found["forward"] if r[0] == ring_attention._KEYS]
        assert len(keys) == len(found["forward"]) == size - 1
        assert len({address for _, address, _ in keys}) == 2
        again = [r for r in found["backward"] if r[0] == ring_attention._KEYS]
        sums = [r for r in found["backward"] if r[0] == ring_attention._GRADIENTS]
        assert len(again) == size - 1 and len({address for _, address, _ in again}) == 2
        assert len(sums) == size and len({address for _, address, _ in sums}) == 2
        assert {nbytes for *_, nbytes in keys + again + sums} == {found["kv"]}
        # For backward: q, out, lse and this rank's own keys and values, at any size of the ring.
        assert found["saved"] == found["own"]


# --- in the model --------------------------------------------------------------------------------
def both_rank(lengths: list[int]) -> float:
    """Return the largest difference between ring and gathered keys, with rotation, on the same micro-batch."""
    world = initialize(Layout(context=2), config(), timeout_s=240)
    cuts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    torch.manual_seed(0)
    rows = rows_of_rank(sum(lengths), world.context_rank, 2)
    qkv_TGNK = torch.randn(sum(lengths), 2, 5, 16)[rows]
    outs = []
    for ring in (True, False):
        documents = packed_documents(cuts, config(), world.context_group, ring)
        documents.rope_tables = rope_tables(config(), documents.max_seqlen_q, CPU)
        assert bool(documents.hops) is ring and (documents.key_rows is None) is ring
        outs.append(rotate_and_attend(qkv_TGNK, documents, SCALE))
    world.close()
    return float((outs[0] - outs[1]).abs().max())


def test_ring_and_gathered_keys_agree() -> None:
    assert max(run_ranks(both_rank, 2, [3, 1, 27, 30, 2, 1], timeout_s=240)) <= 1e-6


def broken_model_rank(change: Callable[[], None]) -> tuple[float, dict[str, Tensor]]:
    world = initialize(Layout(context=4, context_keys="ring"), config(), timeout_s=240)
    change()
    model = build_model(config(), world, seed=0)
    model.zero_grad()
    result = forward_backward(model, share_of(GROUPS, 0, 1), cross_entropy_head)
    gradients = {k: v.clone() for k, v in gradients_to_hf(model)}
    world.close()
    return result.loss, gradients


@pytest.mark.parametrize("change", [merge_without_lse, miss_the_last_hop, go_the_wrong_way])
def test_the_model_s_test_sees_a_broken_ring(change: Callable[[], None]) -> None:
    _, want = reference(config(), GROUPS)
    _, gradients = run_ranks(broken_model_rank, 4, change, timeout_s=240)[0]
    assert worst_error(gradients, want)[0] > 1000 * LIMIT


def test_auto_gathers_on_a_cpu_and_goes_round_on_gpus() -> None:
    assert not Layout(context=2).uses_ring("cpu") and Layout(context=2).uses_ring("cuda")
    assert not Layout().uses_ring("cuda") and Layout(context=2, context_keys="ring").uses_ring("cpu")  # fmt: skip
    assert not Layout(context=2, context_keys="gathered").uses_ring("cuda")
    with pytest.raises(ValueError, match="Layout.context_keys: expected one of"):
        Layout(context_keys="all")  # pyright: ignore[reportArgumentType]
