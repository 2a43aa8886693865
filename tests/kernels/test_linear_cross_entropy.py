"""Cross-entropy against its definition, torch's own and Liger's; rows that do not count; buffers; bad input."""

from typing import Any

import interpreter  # noqa: F401  repairs Triton's interpreter
import pytest
import torch
import torch.nn.functional as F
from head_cases import (
    IGNORE,
    SHAPES,
    assert_same,
    chunk_bytes,
    gemm_flops,
    make_head,
    value_and_grads,
)
from numerics import check_against_reference
from torch import Tensor

from phimini.kernels import linear_cross_entropy, linear_cross_entropy_reference
from phimini.kernels.backend.launch import Backend
from phimini.kernels.head.call import compute_compiled
from phimini.kernels.head.options import ConstantOptions
from phimini.kernels.linear_cross_entropy import CrossEntropy

OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7, "z_loss": 1e-2}, id="z-loss"),
    pytest.param({"label_smoothing": 0.1}, id="smoothing"),
    pytest.param({"rows": True, "label_smoothing": 0.2, "z_loss": 1e-3}, id="per-row"),
]


def row_options(options: dict, M: int) -> dict:
    """`rows` stands for weights, one of them 0, and temperatures per row."""
    options = dict(options)
    if options.pop("rows", False):
        weight_M = torch.rand(M) + 0.5
        weight_M[M // 2] = 0 if M > 1 else 1
        options |= {"row_weight_M": weight_M, "temperature": torch.rand(M) + 0.5}
    return options


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("M", "D", "V"), SHAPES)
def test_equals_the_definition_in_fp64(M: int, D: int, V: int, options: dict) -> None:
    hidden, weight, targets = make_head(M, D, V, torch.float64)
    options = row_options(options, M)
    got = value_and_grads(
        lambda x, w: linear_cross_entropy(
            x, w, targets, chunk_bytes=chunk_bytes(V, torch.float64), **options
        ),
        hidden,
        weight,
    )
    want = value_and_grads(
        lambda x, w: linear_cross_entropy_reference(x, w, targets, **options), hidden, weight
    )
    assert_same(got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_as_precise_as_the_house_rule(options: dict, dtype: torch.dtype) -> None:
    hidden, weight, targets = make_head(37, 20, 101, dtype)
    options = row_options(options, 37)
    check_against_reference(
        lambda hidden, weight: linear_cross_entropy(
            hidden, weight, targets, chunk_bytes=chunk_bytes(101), **options
        )[0],
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, targets, **options)[
            0
        ],
        {"hidden": hidden, "weight": weight},
        torch.ones(()),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_torch(label_smoothing: float) -> None:
    hidden, weight, targets = make_head(37, 20, 101, torch.float64)
    weight_M = torch.full((37,), 1 / int((targets != IGNORE).sum()), dtype=torch.float64)
    leaves = [value.clone().requires_grad_() for value in (hidden, weight)]
    want = F.cross_entropy(leaves[0] @ leaves[1].T, targets, label_smoothing=label_smoothing)
    want.backward()
    got = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = linear_cross_entropy(
        *got, targets, row_weight_M=weight_M, label_smoothing=label_smoothing
    )
    loss.backward()
    torch.testing.assert_close(
        [loss, got[0].grad, got[1].grad], [want, leaves[0].grad, leaves[1].grad]
    )


def test_equals_liger() -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, weight, targets = make_head(21, 16, 64)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}
    got = value_and_grads(
        lambda x, w: linear_cross_entropy(x, w, targets, **options), hidden, weight
    )
    leaves = [value.clone().requires_grad_() for value in (hidden, weight)]
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        *leaves, targets, None, None, IGNORE, options["z_loss"], options["label_smoothing"], "sum"
    )
    dx, dw = torch.autograd.grad(loss, leaves)
    want = {"loss": loss.detach(), "dx": dx, "dw": dw}
    assert_same({name: got[name] for name in want}, want, 1e-5)


def test_dw_in_several_blocks(each_library: str) -> None:
    """oneDNN's results are added to dW 2^18 elements at a time."""
    hidden, weight, targets = make_head(24, 1024, 600)
    ours = lambda x, w: linear_cross_entropy(x, w, targets, chunk_bytes=chunk_bytes(600))
    want = value_and_grads(
        lambda x, w: linear_cross_entropy_reference(x, w, targets), hidden.double(), weight.double()
    )
    got = value_and_grads(ours, hidden, weight)
    assert_same(got, want, 1e-5)


def test_rows_that_do_not_count_are_not_computed() -> None:
    hidden, weight, targets = make_head(40, 8, 50)
    row_weight_M = torch.ones(40)
    row_weight_M[1::5] = 0
    dropped = (targets == IGNORE) | (row_weight_M == 0)
    hidden[dropped] = float("nan")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss, metrics = linear_cross_entropy(*leaves, targets, row_weight_M=row_weight_M)
    loss.backward()
    flops = gemm_flops(lambda: linear_cross_entropy(*leaves, targets, row_weight_M=row_weight_M))
    assert flops == 3 * 2 * int((~dropped).sum()) * 8 * 50
    assert int(metrics.num_rows) == int((~dropped).sum())
    assert loss.isfinite() and leaves[0].grad is not None and leaves[1].grad is not None
    assert bool((leaves[0].grad[dropped] == 0).all()) and bool(leaves[1].grad.isfinite().all())


def test_no_row_counts() -> None:
    hidden, weight, targets = make_head(6, 8, 11)
    got = value_and_grads(
        lambda x, w: linear_cross_entropy(
            x, w, torch.full_like(targets, IGNORE), label_smoothing=0.1
        ),
        hidden,
        weight,
    )
    assert all(bool((value == 0).all()) for value in got.values())


def test_extreme_logits_stay_exact() -> None:
    hidden, weight, targets = make_head(12, 8, 40)
    hidden *= 4e3
    logits = hidden.double() @ weight.double().T
    assert logits.abs().max() > 1e4
    got = value_and_grads(lambda x, w: linear_cross_entropy(x, w, targets), hidden, weight)
    want = value_and_grads(
        lambda x, w: linear_cross_entropy_reference(x, w, targets), hidden.double(), weight.double()
    )
    assert_same(got, want, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 2**-22), (torch.bfloat16, 2**-7)])
def test_accuracy_is_exact(backend: Backend, dtype: torch.dtype, gap: float) -> None:
    """The second best class is the smallest step below the best; an equal one counts as right."""
    hidden, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(300, 8, dtype=dtype)
    hidden[:, 0] = 1
    weight[[7, 290], 0], weight[299, 0] = 1 + gap, 1
    assert weight[7, 0] > 1, "the step exists in this dtype"
    targets = torch.tensor([7, 290, 299, 0])
    _, metrics = linear_cross_entropy(hidden, weight, targets, _backend=backend)
    assert int(metrics.accuracy_sum) == 2 and int(metrics.num_rows) == 4


def test_backward_scales_and_repeats() -> None:
    hidden, weight, targets = make_head(9, 8, 20)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = linear_cross_entropy(*leaves, targets)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(thrice, tuple(3 * value for value in once))
    assert all(bool((a == b).all()) for a, b in zip(once, again, strict=True))


def test_second_derivative_is_refused() -> None:
    hidden, weight, targets = make_head(4, 8, 20)
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_main_grad_takes_dw() -> None:
    hidden, weight, targets = make_head(33, 8, 20)
    want = value_and_grads(lambda x, w: linear_cross_entropy(x, w, targets), hidden, weight)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    main_grad = torch.ones_like(weight)
    for _ in range(2):
        loss, _ = linear_cross_entropy(
            hidden, weight, targets, main_grad=main_grad, chunk_bytes=chunk_bytes(20)
        )
        loss.backward()
    assert weight.grad is None and hidden.grad is not None
    torch.testing.assert_close(main_grad, 1 + 2 * want["dw"])
    torch.testing.assert_close(hidden.grad, 2 * want["dx"])


def test_main_grad_with_a_frozen_trunk() -> None:
    hidden, weight, targets = make_head(33, 8, 20)
    want = value_and_grads(lambda x, w: linear_cross_entropy(x, w, targets), hidden, weight)
    main_grad = torch.zeros(20, 8)
    loss, _ = linear_cross_entropy(hidden, weight.requires_grad_(), targets, main_grad=main_grad)
    loss.backward()
    assert weight.grad is None and hidden.grad is None
    torch.testing.assert_close(main_grad, want["dw"])


@pytest.mark.usefixtures("each_library")
def test_autocast_changes_nothing() -> None:
    """The op says what is fp32; autocast would narrow products inside it."""
    hidden, weight, targets = make_head(33, 8, 20)
    run = lambda: value_and_grads(
        lambda x, w: linear_cross_entropy(x, w, targets, label_smoothing=0.1), hidden, weight
    )
    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert all(bool((got[name] == want[name]).all()) for name in want)


def test_compiled_without_a_break_and_once_for_all_row_counts() -> None:
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    hidden, weight, targets = make_head(33, 8, 20)
    weight.requires_grad_()
    fn = lambda x, w, t: linear_cross_entropy(x, w, t)[0]
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for M in (33, 20, 7):
        x, t = hidden[:M].clone().requires_grad_(), targets[:M].clone()
        got, want = (f(x, weight, t) for f in (compiled, fn))
        assert bool(got == want)
        gradients = [torch.autograd.grad(3 * loss, (x, weight)) for loss in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(graphs) == 1


def test_main_grad_refuses_another_upstream_gradient() -> None:
    hidden, weight, targets = make_head(4, 8, 20)
    loss, _ = linear_cross_entropy(
        hidden.requires_grad_(), weight.requires_grad_(), targets, main_grad=torch.zeros(20, 8)
    )
    with pytest.raises(ValueError, match="gradient 1.*got 0.5"):
        (loss / 2).backward()


def test_frozen_head_and_no_grad_cost_fewer_gemms() -> None:
    hidden, weight, targets = make_head(10, 8, 50, ignored=False)
    gemm = 2 * 10 * 8 * 50
    for needs_dx, needs_dw, num_gemms in ((False, False, 1), (True, False, 2), (False, True, 2)):
        leaves = hidden.detach().requires_grad_(needs_dx), weight.detach().requires_grad_(needs_dw)
        flops = gemm_flops(lambda leaves=leaves: linear_cross_entropy(*leaves, targets))
        assert flops == num_gemms * gemm


def test_is_deterministic_and_chunks_do_not_show() -> None:
    hidden, weight, targets = make_head(100, 16, 60)
    run = lambda budget: value_and_grads(
        lambda x, w: linear_cross_entropy(x, w, targets, chunk_bytes=budget), hidden, weight
    )
    first, again, whole = run(chunk_bytes(60)), run(chunk_bytes(60)), run(None)
    assert all(bool((first[name] == again[name]).all()) for name in first)
    assert_same(first, whole, 1e-6)


def test_opcheck() -> None:
    """The operation that a compiled graph holds, for each combination of gradients."""
    hidden, weight, targets = make_head(9, 8, 20)
    options = ConstantOptions.of(CrossEntropy(label_smoothing=0.1, z_loss=1e-3))
    for values, needs in (([None], (True, True)), ([torch.rand(9)], (False, True))):
        args = (options, hidden, weight, targets, None, 1.0, values)
        torch.library.opcheck(compute_compiled, (*args, *needs))


def test_compiled_with_main_grad_is_refused() -> None:
    hidden, weight, targets = make_head(9, 8, 20)
    fn = lambda x, w, m: linear_cross_entropy(x, w, targets, main_grad=m)[0]
    compiled = torch.compile(fn, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="main_grad cannot be compiled by torch.compile"):
        compiled(hidden, weight.requires_grad_(), torch.zeros(20, 8))


def bad_input(**changes) -> dict:
    hidden, weight, targets = make_head(6, 8, 20, ignored=False)
    arguments = {"hidden_MD": hidden, "weight_VD": weight, "targets_M": targets}
    return arguments | changes


def with_target(value: int) -> Tensor:
    return torch.tensor([1, 2, IGNORE, value, 3, 4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_VD": torch.zeros(20, 9)}, r"\(M, D\) and \(V, D\), got \(6, 8\) and \(20, 9\)"),
        (
            {"weight_VD": torch.zeros(20, 8).bfloat16()},
            "one floating dtype, got torch.float32 and torch.bfloat16",
        ),
        (
            {"weight_VD": torch.zeros(8, 20).T},
            r"weight_VD must be contiguous.*got strides \(1, 20\)",
        ),
        (
            {"targets_M": torch.zeros(5, dtype=torch.int64)},
            r"targets_M must have shape \(6,\).*got \(5,\)",
        ),
        (
            {"hidden_MD": torch.zeros(6, 8).half(), "weight_VD": torch.zeros(20, 8).half()},
            "must not be torch.float16.*use torch.bfloat16",
        ),
        (
            {"row_weight_M": torch.ones(6, requires_grad=True)},
            r"row_weight_M gets no gradient from this op; pass row_weight_M.detach\(\)",
        ),
        ({"temperature": torch.ones(6, requires_grad=True)}, "temperature gets no gradient"),
        ({"main_grad": torch.zeros(20, 8, requires_grad=True)}, "main_grad gets no gradient"),
        ({"targets_M": torch.zeros(6)}, "targets_M must be int64, got torch.float32"),
        ({"targets_M": with_target(20)}, r"targets_M\[3\] is 20, expected a class in \[0, 20\)"),
        ({"targets_M": with_target(-1)}, r"targets_M\[3\] is -1"),
        ({"row_weight_M": torch.zeros(7)}, r"row_weight_M must have shape \(6,\)"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0.*got 0.0"),
        ({"temperature": torch.ones(3)}, r"temperature must have shape \(6,\)"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        (
            {"main_grad": torch.zeros(20, 8).bfloat16()},
            "main_grad must be a contiguous torch.float32",
        ),
        ({"chunk_bytes": 0}, "chunk_bytes must be an integer of at least 1, got 0"),
        ({"max_rows": -1}, "max_rows must be an integer of at least 0, got -1"),
        ({"max_rows": 4}, "max_rows is 4, but 6 rows count"),
        ({"ignore_index": 0.5}, "ignore_index must be an integer, got 0.5"),
        ({"hidden_MD": [1.0]}, "hidden_MD must be a tensor, got list"),
        ({"targets_M": None}, "targets_M must be a tensor, got NoneType"),
        ({"hidden_MD": torch.zeros(6, 8, device="meta")}, "hidden_MD must be on cpu.*got meta"),
        ({"row_weight_M": torch.ones(6, device="meta")}, "row_weight_M must be on cpu.*got meta"),
        ({"weight_VD": torch.zeros(0, 8)}, r"weight_VD must have a row per class, got \(0, 8\)"),
        ({"temperature": torch.arange(6) / 2}, r"temperature\[0\] is 0, expected a finite number"),
        ({"temperature": float("inf")}, "temperature must be a finite number.*got inf"),
        ({"z_loss": float("nan")}, r"z_loss must be in \[0, 1\], got nan"),
        ({"group": "tp"}, "group must be a ProcessGroup or None, got 'tp'"),
        ({"sequence_parallel": True}, "sequence_parallel needs group"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**bad_input(**changes))
