"""The Triton back-end of the four head ops: in the interpreter without a GPU, on the GPU with one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
import torch.distributed as dist
from head_cases import IGNORE, assert_same, make_head, value_and_grads
from head_ranks import run_ranks
from numerics import check_against_reference
from torch import Tensor

from phimini.kernels import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_dpo,
    linear_dpo_reference,
    linear_logprob,
    linear_logprob_reference,
    linear_policy_loss,
    linear_policy_loss_reference,
)
from phimini.kernels.head import block_sizes, call, deferred_checks, triton_backend
from phimini.kernels.head import pairs as head_pairs
from phimini.kernels.linear_dpo import _DpoRun

Loss = Callable[..., tuple[Tensor, Any]]
# rows: below and above one block of 128; classes: whole tiles of 256, a part of one, one; width: not of BLOCK_K = 64
SHAPES = [
    pytest.param(130, 64, 512, id="aligned"),
    pytest.param(37, 72, 601, id="ragged"),
    pytest.param(1, 8, 33, id="one-row"),
    pytest.param(5, 8, 1, id="one-class"),
]


def both(op: Callable, reference: Callable, *arguments, **options) -> tuple[Loss, Loss]:
    def bound(fn: Callable) -> Loss:
        return lambda x, w, **more: fn(x, w, *arguments, **options, **more)

    return bound(op), bound(reference)


def losses(
    M: int, D: int, V: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, dict[str, tuple[Loss, Loss]]]:
    """hidden, weight, and (op, reference) of each loss, with every option in use."""
    hidden, weight, targets = make_head(M, D, V, dtype)
    if M > 1 and V > 1:
        hidden[targets == IGNORE] = float("nan")  # never to be read into a result
    hidden, weight, targets = hidden.to(device), weight.to(device), targets.to(device)
    old_M, advantage_M, reference_M = (torch.randn(M, device=device) for _ in range(3))
    row_weight_M, temperature_M = (torch.rand(M, device=device) + 0.5 for _ in range(2))
    if M > 2:
        row_weight_M[2] = 0
    num_pairs = max(1, M // 8)
    sequence_M = torch.arange(M) * 2 * num_pairs // M  # on the CPU, as the trainer has it
    pair_reference_S = torch.linspace(-40, -30, 2 * num_pairs, device=device)
    fns = {
        "plain": both(linear_cross_entropy, linear_cross_entropy_reference, targets),
        "cross-entropy": both(
            linear_cross_entropy, linear_cross_entropy_reference, targets,
            row_weight_M=row_weight_M, temperature=temperature_M, label_smoothing=0.1, z_loss=1e-3,
        ),
        "policy": both(
            linear_policy_loss, linear_policy_loss_reference, targets, old_M - 5, advantage_M,
            row_weight_M=row_weight_M, temperature=0.7, reference_logp_M=reference_M - 5, kl_coef=0.1,
            entropy_coef=0.02, importance_weight_M=row_weight_M,
        ),
        "dpo": both(
            linear_dpo, linear_dpo_reference, targets, sequence_M, pair_reference_S,
            beta=0.2, nll_weight=0.3, label_smoothing=0.1,
        ),
        "logprob": both(
            lambda *args, **options: _logprob_loss(linear_logprob(*args, **options)),
            lambda *args, **options: _logprob_loss(linear_logprob_reference(*args, **options)),
            targets, temperature=temperature_M,
        ),
    }  # fmt: skip
    return hidden, weight, fns


def _logprob_loss(out) -> tuple[Tensor, Any]:
    scale_M = torch.arange(1, len(out.logp_M) + 1, device=out.logp_M.device) / len(out.logp_M)
    return (out.logp_M * scale_M + 0.5 * out.entropy_M - 0.1 * out.lse_M).sum(), out


NAMES = ["cross-entropy", "plain", "policy", "dpo", "logprob"]


def clean(hidden: Tensor) -> Tensor:
    """For references, which read every row."""
    return hidden.nan_to_num(0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("M", "D", "V"), SHAPES)
def test_fp32_equals_fp64(M: int, D: int, V: int, name: str) -> None:
    hidden, weight, fns = losses(M, D, V, torch.float32)
    op, reference = fns[name]
    want = value_and_grads(reference, clean(hidden).double(), weight.double())
    for budget in (None, 16 * 4 * V):
        got = value_and_grads(
            lambda x, w, b=budget: op(x, w, chunk_bytes=b, _backend="triton"), hidden, weight
        )
        assert_same(got, want, 1e-5)


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_keeps_the_house_rule(
    name: str, generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "generation", lambda device: generation)
    hidden, weight, fns = losses(37, 72, 601, torch.bfloat16)
    op, reference = fns[name]
    check_against_reference(
        lambda hidden, weight: op(hidden, weight, chunk_bytes=16 * 2 * 601, _backend="triton")[0],
        lambda hidden, weight: reference(hidden, weight)[0],
        {"hidden": clean(hidden), "weight": weight},
        torch.ones(()),
    )


def test_forward_only_splits_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 SMs and one block of rows the three tiles go to three programs, and are merged."""
    monkeypatch.setattr(triton_backend, "num_sms", lambda device: 8)
    hidden, weight, targets = make_head(20, 8, 700)
    with interpreter.observe() as report:
        got = linear_logprob(hidden, weight, targets, _backend="triton")
    assert [launch.kernel for launch in report.launches] == [
        "_head_fwd_kernel",
        "_head_merge_kernel",
    ]
    assert report.launches[0].grid == (3, 1, 1)
    want = linear_logprob_reference(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(tuple(got), tuple(v.float() for v in want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rising", [False, True], ids=["falling", "rising"])
def test_forward_only_goes_through_many_tiles(rising: bool) -> None:
    """One program sees 33 tiles whose maxima fall or rise, and the gradient path merges 33 tiles, 32 at a time."""
    hidden, weight, targets = make_head(20, 8, 8440)
    hidden, scale = hidden.abs(), torch.linspace(-3, 3, 8440)
    weight = weight.abs() * (scale if rising else scale.flip(0))[:, None]
    want = linear_logprob_reference(hidden.double(), weight.double(), targets)
    got = linear_logprob(hidden, weight, targets, _backend="triton")
    torch.testing.assert_close(tuple(got), tuple(v.float() for v in want), rtol=1e-5, atol=1e-5)
    bare = linear_logprob(hidden, weight, targets, with_entropy=False, _backend="triton")
    torch.testing.assert_close(bare.lse_M, want.lse_M.float(), rtol=1e-5, atol=1e-5)
    _, metrics = linear_cross_entropy(hidden, weight.requires_grad_(), targets, _backend="triton")
    assert float(metrics.nll_sum) == pytest.approx(-float(want.logp_M.sum()), rel=1e-5)
    assert float(metrics.entropy_sum) == pytest.approx(float(want.entropy_M.sum()), rel=1e-5)


@pytest.mark.parametrize("generation", [80, 90])
def test_targets_at_the_edges_of_tiles_and_splits(
    generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order of the programs: a target that two programs take for theirs shows as a race or a wrong logit."""
    monkeypatch.setattr(triton_backend, "generation", lambda device: generation)
    monkeypatch.setattr(triton_backend, "num_sms", lambda device: 8)
    V, block_n = 700, block_sizes.MATMUL[generation].block_n
    edges = sorted({edge + d for edge in range(0, V, block_n) for d in (-1, 0, 1)} - {-1} | {V - 1})
    hidden, weight, _ = make_head(len(edges), 8, V)
    targets = torch.tensor(edges)
    want = linear_logprob_reference(hidden.double(), weight.double(), targets)
    reference = lambda x, w: linear_cross_entropy_reference(x, w, targets)
    want_grads = value_and_grads(reference, hidden.double(), weight.double())
    ours = lambda x, w: linear_cross_entropy(x, w, targets, _backend="triton")
    for seed in (None, 1, 2):
        with interpreter.observe(shuffle_seed=seed):
            got = linear_logprob(hidden, weight, targets, _backend="triton")
            got_grads = value_and_grads(ours, hidden, weight)
        torch.testing.assert_close(tuple(got), tuple(v.float() for v in want), rtol=1e-5, atol=1e-5)
        assert_same(got_grads, want_grads, 1e-5)
    for i in range(len(edges)):  # alone: a tile is looked at only where a row's target lies in it
        got = linear_logprob(hidden[i : i + 1], weight, targets[i : i + 1], _backend="triton")
        assert abs(float(got.logp_M) - float(want.logp_M[i])) < 1e-5, edges[i]


def test_forward_only_writes_no_logits() -> None:
    hidden, weight, targets = make_head(130, 8, 2048)
    with interpreter.observe() as report:
        linear_logprob(hidden, weight, targets, _backend="triton")
    written = sum(launch.stored_bytes for launch in report.launches)
    assert written < 130 * 2048 * 4 / 50


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_the_order_of_programs(name: str) -> None:
    hidden, weight, fns = losses(130, 8, 600, torch.bfloat16)
    op, _ = fns[name]
    results = []
    for seed in (1, 2):
        with interpreter.observe(shuffle_seed=seed):
            results.append(
                value_and_grads(lambda x, w: op(x, w, _backend="triton"), hidden, weight)
            )
    assert all(bool((results[0][key] == results[1][key]).all()) for key in results[0])


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name: str) -> None:
    hidden, weight, fns = losses(20, 8, 300, torch.float32)
    op, reference = fns[name]
    hidden *= 3e3
    want = value_and_grads(reference, clean(hidden).double(), weight.double())
    got = value_and_grads(lambda x, w: op(x, w, _backend="triton"), hidden, weight)
    assert float((clean(hidden) @ weight.T).abs().max()) > 1e4
    assert_same(got, want, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_row_counts(name: str) -> None:
    hidden, weight, _ = make_head(20, 8, 300)
    targets = torch.full((20,), IGNORE)
    zeros_M = torch.zeros(20)
    op = {
        "dpo": lambda x, w: linear_dpo(
            x, w, targets, torch.arange(20) // 10, zeros_M[:2], _backend="triton"
        ),
        "policy": lambda x, w: linear_policy_loss(
            x, w, targets, zeros_M, zeros_M, _backend="triton"
        ),
        "logprob": lambda x, w: _logprob_loss(linear_logprob(x, w, targets, _backend="triton")),
    }.get(name, lambda x, w: linear_cross_entropy(x, w, targets, _backend="triton"))
    got = value_and_grads(op, hidden * float("nan"), weight)
    assert bool((got["dx"] == 0).all()) and bool((got["dw"] == 0).all())
    if name != "dpo":  # a pair of two empty answers has the loss ln 2
        assert all(bool((value == 0).all()) for value in got.values())


@pytest.mark.parametrize("lengths", [[9, 7, 30, 50, 2, 3, 20, 1]])
@pytest.mark.parametrize("nll_weight", [0.0, 0.4])
def test_pairs_longer_than_a_chunk(lengths: list[int], nll_weight: float) -> None:
    """16 rows to a chunk: whole pairs together, the long one in parts, its rows shuffled and some ignored."""
    sequence_M = torch.repeat_interleave(torch.arange(8), torch.tensor(lengths))
    sequence_M = sequence_M[torch.randperm(len(sequence_M))]
    hidden, weight, targets = make_head(len(sequence_M), 8, 300)
    weight_P = torch.tensor([1.0, 0.5, 0.0, 2.0])
    arguments: dict[str, Any] = dict(
        reference_logp_S=torch.linspace(-99, -30, 8), pair_weight_P=weight_P, nll_weight=nll_weight
    )
    want = value_and_grads(
        lambda x, w: linear_dpo_reference(x, w, targets, sequence_M, **arguments),
        hidden.double(),
        weight.double(),
    )
    got = value_and_grads(
        lambda x, w: linear_dpo(
            x, w, targets, sequence_M, chunk_bytes=16 * 4 * 300, _backend="triton", **arguments
        ),
        hidden,
        weight,
    )
    assert_same(got, want, 1e-5)


def test_a_gpu_s_pairs_are_planned_from_their_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where the host cannot read sequence_M: three products, no second pass, and the same loss."""
    lengths = [3, 5, 20, 9, 1, 2, 4, 4]
    sequence_M = torch.repeat_interleave(torch.arange(8), torch.tensor(lengths))
    hidden, weight, targets = make_head(len(sequence_M), 8, 300)
    results = []
    for rows in (None, (lengths, [n + 2 for n in lengths])):
        if rows is not None:
            monkeypatch.setattr(head_pairs, "host_knows", lambda _: False)
        monkeypatch.setattr(_DpoRun, "_twice", lambda *_: pytest.fail("logits are computed twice"))
        results.append(
            value_and_grads(
                lambda x, w, rows=rows: linear_dpo(
                    x, w, targets, sequence_M, torch.linspace(-99, -30, 8), sequence_rows=rows,
                    chunk_bytes=16 * 4 * 300, _backend="triton",
                ),
                hidden,
                weight,
            )
        )  # fmt: skip
    assert_same(results[1], results[0], 1e-6)


def test_a_hint_of_the_number_of_rows_shortens_the_gemms() -> None:
    hidden, weight, targets = make_head(100, 8, 300)
    targets[40:] = IGNORE
    run = lambda hint: value_and_grads(
        lambda x, w: linear_cross_entropy(x, w, targets, max_rows=hint, _backend="triton"),
        hidden,
        weight,
    )
    assert_same(run(40), run(None), 1e-6)
    with pytest.raises(ValueError, match="max_rows is 20, but 32 rows count"):
        run(20)


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_split_over_ranks(name: str, tmp_path: Path) -> None:
    hidden, weight, fns = losses(37, 8, 600, torch.float32)
    op, _ = fns[name]
    want = value_and_grads(lambda x, w: op(x, w, _backend="triton"), hidden, weight)

    def rank_results(rank: int) -> dict[str, Tensor]:
        share = weight.chunk(2)[rank].contiguous()
        return value_and_grads(
            lambda x, w: op(x, w, _backend="triton", group=dist.group.WORLD), hidden, share
        )

    parts = run_ranks(2, tmp_path, rank_results)
    assert_same(parts[0] | {"dw": torch.cat([part["dw"] for part in parts])}, want, 1e-6)


class _Launcher:
    """In place of a kernel: notes that it was launched."""

    def __init__(self, launched: list[str], kernel: str) -> None:
        self.launched, self.kernel = launched, kernel

    def __getitem__(self, grid: tuple[int, ...]):
        assert all(isinstance(n, int) and n > 0 for n in grid)
        return lambda *args, **kwargs: self.launched.append(self.kernel)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("name", NAMES)
def test_the_host_waits_for_nothing(
    name: str, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, which have no values: whatever asks for one raises."""
    launched: list[str] = []
    for kernel in ("fwd", "logits", "merge", "gradient"):
        monkeypatch.setattr(triton_backend, f"_head_{kernel}_kernel", _Launcher(launched, kernel))
    monkeypatch.setattr(
        call, "check_later", lambda bad_M, value_M, _: deferred_checks.first_bad(bad_M, value_M)
    )
    hidden, weight, fns = losses(64, 16, 700, torch.bfloat16, "meta")
    x, w = hidden.requires_grad_(gradient), weight.requires_grad_(gradient)
    loss, _ = fns[name][0](x, w, chunk_bytes=16 * 700 * 2, _backend="triton")
    if gradient:
        loss.backward()
    assert {"logits", "gradient"} <= set(launched) if gradient else "fwd" in launched
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()


@pytest.mark.parametrize("num_sms", [1, 108, 132, 148])
@pytest.mark.parametrize("num_row_blocks", [1, 3, 16, 128, 140, 512])
def test_splits_keep_the_chip_busy(num_row_blocks: int, num_sms: int) -> None:
    splits = block_sizes.vocabulary_splits(num_row_blocks, 782, num_sms)
    programs = num_row_blocks * splits
    use = programs / (-(-programs // num_sms) * num_sms)
    assert 1 <= splits <= 32 and (use >= 0.9 or splits * num_row_blocks < num_sms)


def test_the_first_bad_value_is_found_without_waiting() -> None:
    values_M = torch.tensor([3, 9, 4, 7])
    found_2 = deferred_checks.first_bad(values_M > 5, values_M)
    assert found_2.tolist() == [1.0, 9.0]
    assert deferred_checks.first_bad(values_M > 9, values_M)[0] == -1


def test_bad_target_is_named_on_the_fused_path() -> None:
    hidden, weight, targets = make_head(20, 8, 300, ignored=False)
    targets[7] = 300
    for op in (linear_logprob, linear_cross_entropy):
        with pytest.raises(ValueError, match=r"targets_M\[7\] is 300, expected a class in"):
            op(hidden, weight, targets, _backend="triton")


def test_narrow_width_is_named() -> None:
    hidden, weight, targets = make_head(6, 9, 20)
    with pytest.raises(
        ValueError, match="width D must be a multiple of 8 for torch.bfloat16.*got 9"
    ):
        linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets, _backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str) -> None:
    """Compiled, without a host synchronisation, as precise as the house rule asks."""
    hidden, weight, fns = losses(300, 256, 5000, torch.bfloat16, "cuda")
    op, reference = fns[name]
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_grads(lambda x, w: op(x, w), hidden, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_against_reference(
        lambda hidden, weight: op(hidden, weight)[0],
        lambda hidden, weight: reference(hidden, weight)[0],
        {"hidden": clean(hidden), "weight": weight},
        torch.ones(()),
    )


@pytest.mark.gpu
def test_bad_target_on_a_gpu_is_named_later() -> None:
    hidden, weight, targets = make_head(20, 64, 300, torch.bfloat16, ignored=False)
    targets[7] = 300
    linear_cross_entropy(hidden.cuda(), weight.cuda(), targets.cuda())
    with pytest.raises(ValueError, match=r"targets_M\[7\] is 300, expected a class in \[0, 300\)"):
        deferred_checks.raise_pending(wait=True)
