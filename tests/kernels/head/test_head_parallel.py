"""A vocabulary split over ranks, rows split over ranks, sequences split over ranks: the same result as on one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_cases import IGNORE, assert_same, chunk_bytes, make_head, value_and_grads
from head_ranks import run_ranks
from torch import Tensor

from phimini.kernels import linear_cross_entropy, linear_dpo, linear_logprob, linear_policy_loss

M, D, V = 48, 16, 64
Loss = Callable[..., tuple[Tensor, Any]]


def losses(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Loss]]:
    """hidden, weight, and each loss as a function of (hidden, weight, **parallel options)."""
    hidden, weight, targets = make_head(M, D, V, dtype)
    rows = {name: torch.randn(M) for name in ("old", "advantage", "reference")}
    row_weight_M, temperature_M = torch.rand(M), torch.rand(M) + 0.5
    sequence_M = torch.arange(M) // 8
    budget = chunk_bytes(V, dtype)

    def logprob(x: Tensor, w: Tensor, **options):
        out = linear_logprob(x, w, targets, temperature=temperature_M, **options)
        scale_M = torch.arange(M) / M
        return (out.logp_M * scale_M + out.entropy_M - 0.1 * out.lse_M).sum(), out

    return hidden, weight, {
        "logprob": logprob,
        "cross-entropy": lambda x, w, **options: linear_cross_entropy(
            x, w, targets, row_weight_M=row_weight_M, temperature=temperature_M, label_smoothing=0.1, z_loss=1e-3,
            chunk_bytes=budget, **options,
        ),
        "dpo": lambda x, w, **options: linear_dpo(
            x, w, targets, sequence_M, torch.linspace(-40, -30, 6), nll_weight=0.3, chunk_bytes=budget, **options,
        ),
        "policy": lambda x, w, **options: linear_policy_loss(
            x, w, targets, rows["old"] - 5, rows["advantage"], temperature=temperature_M,
            reference_logp_M=rows["reference"] - 5, kl_coef=0.1, entropy_coef=0.02, chunk_bytes=budget, **options,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp-sp"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_split_vocabulary_equals_one_rank(
    tmp_path: Path, world_size: int, sequence_parallel: bool
) -> None:
    hidden, weight, fns = losses(torch.float32)
    want = {name: value_and_grads(fn, hidden, weight) for name, fn in fns.items()}

    def rank_results(rank: int) -> dict[str, dict[str, Tensor]]:
        share = weight.chunk(world_size)[rank].contiguous()
        rows = hidden.chunk(world_size)[rank] if sequence_parallel else hidden
        options = {"group": dist.group.WORLD, "sequence_parallel": sequence_parallel}
        return {
            name: value_and_grads(lambda x, w, fn=fn: fn(x, w, **options), rows, share)
            for name, fn in fns.items()
        }

    ranks = run_ranks(world_size, tmp_path, rank_results)
    for name in fns:
        parts = [rank[name] for rank in ranks]
        joined = parts[0] | {"dw": torch.cat([part["dw"] for part in parts])}
        if sequence_parallel:
            joined["dx"] = torch.cat([part["dx"] for part in parts])
        assert_same(joined, want[name], 1e-6)
        for part in parts[1:]:
            same = part.keys() - {"dw"} - ({"dx"} if sequence_parallel else set())
            assert all(bool((part[key] == parts[0][key]).all()) for key in same), (
                f"{name}: ranks differ in their last bits"
            )


def test_extreme_logits_on_one_rank_only(tmp_path: Path) -> None:
    """The other rank's classes are all hopeless, its targets too: exp(max - lse) underflows there."""
    hidden, weight, targets = make_head(12, D, V, ignored=False)
    hidden = hidden.abs()
    weight[: V // 2] = weight[: V // 2].abs() * 50
    weight[V // 2 :] = -weight[V // 2 :].abs() * 50
    want = value_and_grads(lambda x, w: linear_cross_entropy(x, w, targets), hidden, weight)
    assert float(want["nll_sum"]) > 1e3

    def rank_results(rank: int) -> dict[str, Tensor]:
        share = weight.chunk(2)[rank].contiguous()
        return value_and_grads(
            lambda x, w: linear_cross_entropy(x, w, targets, group=dist.group.WORLD), hidden, share
        )

    parts = run_ranks(2, tmp_path, rank_results)
    assert_same(parts[0] | {"dw": torch.cat([part["dw"] for part in parts])}, want, 1e-6)


@pytest.mark.parametrize("budget", [None, chunk_bytes(V)], ids=["one-chunk", "chunks"])
def test_split_sequences_equal_one_rank(tmp_path: Path, budget: int | None) -> None:
    """Context parallel: rank 0 has the head of each sequence, rank 1 the rest and one sequence alone."""
    hidden, weight, targets = make_head(M, D, V)
    sequence_M = torch.arange(M) // 8
    is_second_M = (torch.arange(M) % 8 >= 3) | (sequence_M == 3)
    arguments = {
        "reference_logp_S": torch.linspace(-40, -30, 6),
        "nll_weight": 0.3,
        "chunk_bytes": budget,
    }

    def dpo(x: Tensor, w: Tensor, rows: Tensor | slice, **options):
        return linear_dpo(x, w, targets[rows], sequence_M[rows], **arguments, **options)

    want = value_and_grads(lambda x, w: dpo(x, w, slice(None)), hidden, weight)

    def rank_results(rank: int) -> dict[str, Tensor]:
        rows = is_second_M if rank else ~is_second_M
        return value_and_grads(
            lambda x, w: dpo(x, w, rows, sequence_group=dist.group.WORLD), hidden[rows], weight
        )

    first, second = run_ranks(2, tmp_path, rank_results)
    dx = torch.empty_like(hidden)
    dx[~is_second_M], dx[is_second_M] = first["dx"], second["dx"]
    assert_same(first | {"dx": dx, "dw": first["dw"] + second["dw"]}, want, 2e-6)
    assert bool(first["loss"] == second["loss"])


def test_unequal_shares_are_refused_on_every_rank(tmp_path: Path) -> None:
    hidden, weight, targets = make_head(8, D, 63)

    def rank_results(rank: int) -> str:
        share = weight[:32] if rank == 0 else weight[32:]
        with pytest.raises(ValueError) as error:
            linear_cross_entropy(hidden, share.contiguous(), targets % 62, group=dist.group.WORLD)
        return str(error.value)

    for message in run_ranks(2, tmp_path, rank_results):
        assert "V not divisible by TP" in message and "got [32, 31]" in message


def test_targets_are_global(tmp_path: Path) -> None:
    hidden, weight, targets = make_head(8, D, V, ignored=False)
    targets[5] = V

    def rank_results(rank: int) -> str:
        with pytest.raises(ValueError) as error:
            linear_cross_entropy(
                hidden, weight.chunk(2)[rank].contiguous(), targets, group=dist.group.WORLD
            )
        return str(error.value)

    for message in run_ranks(2, tmp_path, rank_results):
        assert f"targets_M[5] is {V}, expected a class in [0, {V}) or ignore_index" in message
    assert IGNORE not in targets
