"""DPO against its definition, TRL's and Liger's formulas; packing, long pairs, pairs that do not count."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_cases import IGNORE, assert_same, chunk_bytes, gemm_flops, make_head, value_and_grads
from numerics import check_against_reference
from torch import Tensor

from phimini.kernels import linear_dpo, linear_dpo_reference
from phimini.kernels.head.call import compute_compiled
from phimini.kernels.head.options import ConstantOptions
from phimini.kernels.linear_dpo import Dpo

# rows of each sequence; a budget of 16 rows holds some pairs together, some alone, and the long one in parts
LENGTHS = {
    "short-and-long": [3, 4, 5, 2, 30, 25, 1, 6],
    "one-pair": [20, 20],
    "one-row-each": [1, 1],
    "empty-answers": [0, 3, 4, 0, 0, 0, 2, 2],
}
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"label_smoothing": 0.1, "beta": 0.5}, id="smoothing"),
    pytest.param({"nll_weight": 0.7}, id="nll"),
    pytest.param({"nll_weight": 0.3, "label_smoothing": 0.2, "pair_weight_P": True}, id="weights"),
    pytest.param({"length_normalized": True, "beta": 2.0}, id="mean-logp"),
    pytest.param({"loss": "ipo", "nll_weight": 0.5, "nll_scale_P": True}, id="ipo-nll-of-tokens"),
    pytest.param(
        {"loss": "ipo", "length_normalized": True, "pair_weight_P": True}, id="ipo-mean-logp"
    ),  # fmt: skip
]


def dpo_inputs(
    lengths: list[int], D: int, V: int, options: dict[str, Any], dtype: torch.dtype = torch.float64,
    shuffled: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    sequence_M = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    hidden, weight, targets = make_head(len(sequence_M), D, V, dtype)
    if len(targets) < 3:
        targets = torch.randint(0, V, targets.shape)
    if shuffled:
        sequence_M = sequence_M[torch.randperm(len(sequence_M))]
    options = dict(options)
    if options.get("pair_weight_P") is True:
        options["pair_weight_P"] = torch.rand(len(lengths) // 2) + 0.5
        options["pair_weight_P"][len(lengths) // 4] = 0
    if options.get("nll_scale_P") is True:
        options["nll_scale_P"] = torch.rand(len(lengths) // 2) + 0.1
    reference_S = -4.0 * torch.tensor(lengths) + torch.randn(len(lengths))
    return hidden, weight, {
        "targets_M": targets, "sequence_M": sequence_M, "reference_logp_S": reference_S
    } | options  # fmt: skip


@pytest.mark.parametrize("shuffled", [False, True], ids=["packed", "shuffled"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_the_definition_in_fp64(lengths: list[int], options: dict, shuffled: bool) -> None:
    hidden, weight, arguments = dpo_inputs(lengths, 12, 50, options, shuffled=shuffled)
    want = value_and_grads(lambda x, w: linear_dpo_reference(x, w, **arguments), hidden, weight)
    for budget in (chunk_bytes(50, torch.float64), None):
        got = value_and_grads(
            lambda x, w, b=budget: linear_dpo(x, w, chunk_bytes=b, **arguments), hidden, weight
        )
        assert_same(got, want, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_as_precise_as_the_house_rule(options: dict, dtype: torch.dtype) -> None:
    hidden, weight, arguments = dpo_inputs(LENGTHS["short-and-long"], 20, 101, options, dtype)
    check_against_reference(
        lambda hidden, weight: linear_dpo(
            hidden, weight, chunk_bytes=chunk_bytes(101), **arguments
        )[0],
        lambda hidden, weight: linear_dpo_reference(hidden, weight, **arguments)[0],
        {"hidden": hidden, "weight": weight},
        torch.ones(()),
    )


def test_equals_trl() -> None:
    """TRL 0.26 DPOTrainer: sigmoid loss, label smoothing, rpo_alpha over each chosen answer's mean."""
    hidden, weight, arguments = dpo_inputs([7, 5, 4, 9], 12, 50, {})
    targets, sequence_M = arguments["targets_M"], arguments["sequence_M"]
    ref = arguments["reference_logp_S"].double()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    per_token = torch.log_softmax(leaves[0] @ leaves[1].T, -1).gather(
        1, targets.clamp_min(0)[:, None]
    )[:, 0]
    mask = targets != IGNORE
    logps = torch.stack([(per_token * (mask & (sequence_M == s))).sum() for s in range(4)])
    counts = torch.stack([(mask & (sequence_M == s)).sum() for s in range(4)])
    logits = (logps[0::2] - logps[1::2]) - (ref[0::2] - ref[1::2])
    beta, smoothing, alpha = 0.2, 0.1, 0.6
    losses = (
        -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing
    )
    losses = losses - alpha * logps[0::2] / counts[0::2]
    dx, dw = torch.autograd.grad(losses.mean(), leaves)
    got = value_and_grads(
        lambda x, w: linear_dpo(
            x, w, beta=beta, label_smoothing=smoothing, nll_weight=alpha, pair_weight_P=torch.full((2,), 0.5),
            **arguments,
        ),
        hidden,
        weight,
    )  # fmt: skip
    want = {"loss": losses.mean().detach(), "dx": dx, "dw": dw}
    assert_same({name: got[name] for name in want}, want, 1e-11)
    rewards = beta * (logps.detach() - ref)
    torch.testing.assert_close(got["margin_sum"], (rewards[0::2] - rewards[1::2]).sum())


def test_ipo_of_mean_logps_equals_trl() -> None:
    """TRL 0.26 DPOTrainer, loss_type ipo: log-probs averaged over each answer, (logits - 1 / (2 beta))^2."""
    hidden, weight, arguments = dpo_inputs([7, 5, 4, 9], 12, 50, {})
    targets, sequence_M = arguments["targets_M"], arguments["sequence_M"]
    beta, leaves = 0.3, (hidden.requires_grad_(), weight.requires_grad_())
    logp_MV = torch.log_softmax(leaves[0] @ leaves[1].T, -1)
    logp_M = logp_MV.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    mask_SM = (targets != IGNORE) & (sequence_M == torch.arange(4)[:, None])
    means = (logp_M * mask_SM).sum(1) / mask_SM.sum(1)
    reference = arguments["reference_logp_S"].double() / mask_SM.sum(1)
    logits = (means[0::2] - means[1::2]) - (reference[0::2] - reference[1::2])
    want = ((logits - 1 / (2 * beta)) ** 2).sum()
    dx, dw = torch.autograd.grad(want, leaves)
    got = value_and_grads(
        lambda x, w: linear_dpo(x, w, beta=beta, loss="ipo", length_normalized=True, **arguments),
        hidden,
        weight,
    )
    expected = {"loss": want.detach(), "dx": dx, "dw": dw}
    assert_same({name: got[name] for name in expected}, expected, 1e-11)


def test_equals_liger() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    P, T = 3, 6
    hidden, weight, targets = make_head(2 * P * T, 8, 30, torch.float64)
    ref_weight = torch.randn(30, 8).double()
    # Liger's order: all chosen answers, then all rejected ones
    sequence_M = (torch.arange(2 * P) % P * 2 + torch.arange(2 * P) // P).repeat_interleave(T)
    reference_S = linear_dpo_reference(hidden, ref_weight, targets, sequence_M, torch.zeros(2 * P))[
        1
    ]  # only to have the metrics' type checked
    assert reference_S.num_pairs == P
    log_p = torch.log_softmax(hidden @ ref_weight.T, -1).gather(1, targets.clamp_min(0)[:, None])[
        :, 0
    ]
    ref_S = torch.zeros(2 * P).double().index_add(0, sequence_M, log_p.where(targets != IGNORE, 0))
    liger = LigerFusedLinearDPOLoss(
        ignore_index=IGNORE, beta=0.2, compute_nll_loss=False, compiled=False, use_ref_model=True
    )
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss, *_ = liger(
        leaves[1], leaves[0].view(2 * P, T, 8), targets.view(2 * P, T),
        ref_input=hidden.detach().view(2 * P, T, 8), ref_weight=ref_weight,
    )  # fmt: skip
    dx, dw = torch.autograd.grad(loss, leaves)
    got = value_and_grads(
        lambda x, w: linear_dpo(
            x,
            w,
            targets,
            sequence_M,
            ref_S,
            beta=0.2,
            pair_weight_P=torch.full((P,), 1 / P).double(),
        ),
        hidden,
        weight,
    )
    want = {"loss": loss.detach(), "dx": dx, "dw": dw}
    assert_same({name: got[name] for name in want}, want, 1e-6)


def test_equal_policy_and_reference_give_ln_2() -> None:
    hidden, weight, arguments = dpo_inputs([5, 4, 3, 8], 12, 50, {})
    zeros: dict[str, Any] = arguments | {"reference_logp_S": torch.zeros(4)}
    chosen, rejected = [
        linear_dpo(hidden, weight, **zeros)[1]._asdict()[f"{name}_logp_sum"]
        for name in ("chosen", "rejected")
    ]
    single: dict[str, Any] = {name: value[arguments["sequence_M"] < 2] if name != "reference_logp_S" else value[:2]
              for name, value in zeros.items()}  # fmt: skip
    metrics = linear_dpo(hidden[:9], weight, **single)[1]
    single["reference_logp_S"] = torch.stack([metrics.chosen_logp_sum, metrics.rejected_logp_sum])
    loss, metrics = linear_dpo(hidden[:9], weight, **single)
    assert float(loss) == pytest.approx(0.6931471805599453, abs=1e-12)
    assert float(metrics.margin_sum) == pytest.approx(0, abs=1e-9)
    assert float(chosen) < 0 and float(rejected) < 0


def test_swapping_the_answers_changes_sign() -> None:
    hidden, weight, arguments = dpo_inputs([5, 4], 12, 50, {"beta": 0.3})
    swapped = arguments | {
        "sequence_M": 1 - arguments["sequence_M"],
        "reference_logp_S": arguments["reference_logp_S"].flip(0),
    }
    one, other = (linear_dpo(hidden, weight, **a)[1] for a in (arguments, swapped))
    torch.testing.assert_close(one.margin_sum, -other.margin_sum)
    assert abs(float(one.margin_sum)) > 0.01


@pytest.mark.parametrize("nll_weight", [0.0, 0.5])
def test_long_pairs_cost_three_gemms_too(nll_weight: float) -> None:
    hidden, weight, arguments = dpo_inputs([50, 40, 3, 2], 8, 40, {}, torch.float32)
    kept = int((arguments["targets_M"] != IGNORE).sum())
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    flops = gemm_flops(
        lambda: linear_dpo(
            *leaves, chunk_bytes=chunk_bytes(40), nll_weight=nll_weight, **arguments
        )[0].backward()
    )
    assert flops == 3 * 2 * kept * 8 * 40


def test_pairs_of_weight_zero_are_not_computed() -> None:
    hidden, weight, arguments = dpo_inputs(
        [5, 4, 3, 8], 12, 50, {"pair_weight_P": torch.tensor([0.0, 2.0])}
    )
    hidden[arguments["sequence_M"] < 2] = float("nan")
    got = value_and_grads(lambda x, w: linear_dpo(x, w, **arguments), hidden, weight)
    assert all(bool(value.isfinite().all()) for value in got.values())
    assert int(got["num_pairs"]) == 1 and bool((got["dx"][:9] == 0).all())


@pytest.mark.parametrize("lengths", [LENGTHS["short-and-long"]])
def test_main_grad_takes_dw(lengths: list[int]) -> None:
    hidden, weight, arguments = dpo_inputs(lengths, 12, 50, {"nll_weight": 0.4}, torch.float32)
    arguments["chunk_bytes"] = chunk_bytes(50)
    want = value_and_grads(lambda x, w: linear_dpo(x, w, **arguments), hidden, weight)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    main_grad = torch.ones_like(weight)
    linear_dpo(*leaves, main_grad=main_grad, **arguments)[0].backward()
    assert weight.grad is None
    torch.testing.assert_close([main_grad, hidden.grad], [1 + want["dw"], want["dx"]])


def test_opcheck() -> None:
    hidden, weight, arguments = dpo_inputs([5, 4, 3, 8], 12, 50, {}, torch.float32)
    values = [arguments["sequence_M"], arguments["reference_logp_S"], None, None]
    options = Dpo(
        beta=0.1,
        label_smoothing=0.0,
        nll_weight=0.2,
        loss="dpo",
        length_normalized=False,
        sequence_group=None,
    )
    args = (ConstantOptions.of(options), hidden, weight, arguments["targets_M"], None, 1.0, values)
    torch.library.opcheck(compute_compiled, (*args, True, True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sequence_M": torch.zeros(8, dtype=torch.int64)},
            r"sequence_M must have shape \(9,\).*got \(8,\)",
        ),
        ({"sequence_M": torch.zeros(9)}, "sequence_M must be int64, got torch.float32"),
        (
            {"sequence_M": torch.full((9,), 2)},
            r"sequence_M\[1\] is 2, expected a sequence in \[0, 2\)",
        ),
        ({"reference_logp_S": torch.zeros(3)}, r"reference_logp_S must be \(2P,\).*got \(3,\)"),
        ({"pair_weight_P": torch.zeros(2)}, r"pair_weight_P must be \(1,\).*got \(2,\)"),
        ({"pair_weight_P": torch.ones(1, requires_grad=True)}, "pair_weight_P gets no gradient"),
        (
            {"reference_logp_S": torch.ones(2, requires_grad=True)},
            "reference_logp_S gets no gradient",
        ),
        ({"label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\).*got 0.1, 0.5"),
        ({"beta": float("nan")}, "expected beta > 0.*got nan"),
        ({"sequence_group": "cp"}, "sequence_group must be a ProcessGroup or None, got 'cp'"),
        (
            {"targets_M": torch.full((9,), 50)},
            r"targets_M\[0\] is 50, expected a class in \[0, 50\)",
        ),
    ],
    ids=[
        "sequence-shape",
        "sequence-dtype",
        "sequence-range",
        "reference",
        "pair-weight",
        "pair-weight-gradient",
        "reference-gradient",
        "smoothing",
        "beta",
        "group",
        "target",
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    hidden, weight, arguments = dpo_inputs([5, 4], 12, 50, {})
    with pytest.raises(ValueError, match=f"linear_dpo: .*{message}"):
        linear_dpo(hidden, weight, **arguments | changes)


def test_rows_of_sequences_that_do_not_fit_are_refused() -> None:
    x, w, targets = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    sequence_M, reference_S = torch.tensor([0, 0, 1, 2, 3, 3]), torch.zeros(4)
    right = [2, 1, 1, 2]
    for rows in (([2, 1, 1], right), ([3, 1, 1, 2], [3, 1, 1, 2]), (right, [1, 1, 1, 2])):
        with pytest.raises(ValueError, match="linear_dpo: sequence_rows must be two lists of 4"):
            linear_dpo(x, w, targets, sequence_M, reference_S, sequence_rows=rows)
