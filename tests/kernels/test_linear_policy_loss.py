"""The policy loss against its definition, TRL's and Liger's formulas, and what its KL gradients estimate."""

from typing import Any

import pytest
import torch
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

from phimini.kernels import (
    linear_logprob_reference,
    linear_policy_loss,
    linear_policy_loss_reference,
)
from phimini.kernels.head.call import compute_compiled
from phimini.kernels.head.options import ConstantOptions
from phimini.kernels.linear_policy_loss import PolicyLoss

OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"kl_coef": 0.3, "kl": "k1"}, id="k1"),
    pytest.param({"kl_coef": 0.3, "kl": "k2", "row_weight_M": True}, id="k2-weights"),
    pytest.param({"kl_coef": 0.3, "kl": "k3", "importance_weight_M": True}, id="k3-importance"),
    pytest.param({"kl_coef": 0.3, "kl": "k3", "kl_gradient": "reverse"}, id="k3-reverse"),
    pytest.param({"entropy_coef": 0.05, "temperature": True}, id="entropy"),
    pytest.param(
        {
            "entropy_coef": 0.05,
            "kl_coef": 0.1,
            "row_weight_M": True,
            "temperature": 0.8,
            "clip_low": 0.1,
        },
        id="everything",
    ),
    pytest.param({"objective": "cispo", "clip_low": 1.0, "row_weight_M": True}, id="cispo"),
    pytest.param({"dual_clip": 1.2, "importance_weight_M": True, "kl_coef": 0.1}, id="dual-clip"),
    pytest.param({"sequence_log_ratio_M": True, "dual_clip": 1.4}, id="gspo"),
    pytest.param({"sequence_log_ratio_M": True, "objective": "cispo"}, id="gspo-cispo"),
]


def policy_inputs(
    M: int, D: int, V: int, options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """hidden, weight and the other arguments; old log-probs near enough that all branches of the clip occur."""
    hidden, weight, targets = make_head(M, D, V, dtype)
    logp_M = linear_logprob_reference(hidden.double(), weight.double(), targets).logp_M
    options = dict(options)
    for name, value in options.items():
        if value is True:
            options[name] = torch.rand(M) + 0.5
    if "row_weight_M" in options and M > 1:
        options["row_weight_M"][M // 2] = 0
    if "sequence_log_ratio_M" in options:
        options["sequence_log_ratio_M"] = 0.4 * torch.randn(M)
    if options.get("kl_coef"):
        options["reference_logp_M"] = logp_M + 0.2 * torch.randn(M)
    arguments = {
        "targets_M": targets,
        "old_logp_M": logp_M + 0.4 * torch.randn(M),
        "advantage_M": torch.randn(M),
    }
    return hidden, weight, arguments | options


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("M", "D", "V"), SHAPES)
def test_equals_the_definition_in_fp64(M: int, D: int, V: int, options: dict[str, Any]) -> None:
    hidden, weight, arguments = policy_inputs(M, D, V, options)
    budget = chunk_bytes(V, torch.float64)
    got = value_and_grads(
        lambda x, w: linear_policy_loss(x, w, chunk_bytes=budget, **arguments), hidden, weight
    )
    want = value_and_grads(
        lambda x, w: linear_policy_loss_reference(x, w, **arguments), hidden, weight
    )
    assert_same(got, want, 1e-11)
    if M > 30:
        assert 0 < int(want["clipped_sum"]) < M, "the clip must be hit, and not always"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_as_precise_as_the_house_rule(options: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, arguments = policy_inputs(37, 20, 101, options, dtype)
    check_against_reference(
        lambda hidden, weight: linear_policy_loss(
            hidden, weight, chunk_bytes=chunk_bytes(101), **arguments
        )[0],
        lambda hidden, weight: linear_policy_loss_reference(hidden, weight, **arguments)[0],
        {"hidden": hidden, "weight": weight},
        torch.ones(()),
    )


def trl_grpo_loss(logp_BT: Tensor, old_BT: Tensor, ref_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor,
                  beta: float, low: float, high: float, form: str) -> Tensor:  # fmt: skip
    """TRL 0.26 GRPOTrainer._compute_loss, token level, loss_type grpo or dapo (one process, no accumulation)."""
    per_token_kl = torch.exp(ref_BT - logp_BT) - (ref_BT - logp_BT) - 1
    coef_1 = torch.exp(logp_BT - old_BT)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    per_token_loss = -torch.min(coef_1 * advantage_B[:, None], coef_2 * advantage_B[:, None])
    per_token_loss = per_token_loss + beta * per_token_kl
    if form == "grpo":
        return ((per_token_loss * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1.0)).mean()
    return (per_token_loss * mask_BT).sum() / mask_BT.sum().clamp(min=1.0)


def grpo_batch(B: int, T: int, D: int, V: int) -> dict[str, Tensor]:
    hidden, weight, targets = make_head(B * T, D, V, torch.float64, ignored=False)
    mask_BT = (torch.arange(T) < torch.tensor([T, T // 2, 3, T - 1])[:B, None]).double()
    logp_BT = linear_logprob_reference(hidden, weight, targets).logp_M.view(B, T)
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "mask": mask_BT, "advantage": torch.randn(B).double(),
        "old": logp_BT + 0.3 * torch.randn(B, T).double(), "ref": logp_BT + 0.3 * torch.randn(B, T).double(),
    }  # fmt: skip


def test_gspo_is_the_objective_of_whole_sequences() -> None:
    """Equation 5 of arXiv 2507.18071, differentiated by autograd: one ratio and one clip for each sequence."""
    batch = grpo_batch(4, 9, 8, 30)
    lengths_B, low, high = batch["mask"].sum(-1), 0.03, 0.04
    advantage_B = batch["advantage"]

    def ratios(logp_M: Tensor) -> Tensor:
        difference_BT = (logp_M.view_as(batch["mask"]) - batch["old"]) * batch["mask"]
        return difference_BT.sum(-1) / lengths_B

    def paper(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logp_M = linear_logprob_reference(hidden, weight, batch["targets"]).logp_M
        s_B = ratios(logp_M).exp()
        limited_B = s_B.clamp(1 - low, 1 + high)
        return -torch.minimum(s_B * advantage_B, limited_B * advantage_B).mean(), logp_M.detach()

    hidden, weight = (batch[name].clone().requires_grad_() for name in ("hidden", "weight"))
    want, logp_M = paper(hidden, weight)
    want.backward()
    per_token_BT = batch["mask"] / lengths_B[:, None] / len(lengths_B)
    T = batch["mask"].shape[1]
    got = value_and_grads(
        lambda x, w: linear_policy_loss(
            x, w, batch["targets"], batch["old"].flatten(), advantage_B.repeat_interleave(T),
            row_weight_M=per_token_BT.flatten(), clip_low=low, clip_high=high,
            sequence_log_ratio_M=ratios(logp_M).repeat_interleave(T),
        ),
        batch["hidden"],
        batch["weight"],
    )  # fmt: skip
    assert 0 < int(got["clipped_sum"]) < int(batch["mask"].sum())
    torch.testing.assert_close(got["loss"], want.detach())
    torch.testing.assert_close(
        [got["dx"], got["dw"]], [hidden.grad, weight.grad], rtol=1e-9, atol=1e-12
    )


def ours_on_grpo_batch(batch: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    B, T = batch["mask"].shape
    per_row_BT = batch["mask"] / batch["mask"].sum()
    if form == "grpo":
        per_row_BT = batch["mask"] / batch["mask"].sum(-1, keepdim=True) / B
    targets = batch["targets"].where(batch["mask"].flatten() > 0, IGNORE)
    got = value_and_grads(
        lambda x, w: linear_policy_loss(
            x, w, targets, batch["old"].flatten(), batch["advantage"].repeat_interleave(T),
            row_weight_M=per_row_BT.flatten(), reference_logp_M=batch["ref"].flatten(), kl_coef=0.1,
        ),
        batch["hidden"],
        batch["weight"],
    )  # fmt: skip
    return {name: got[name] for name in ("loss", "dx", "dw")}


@pytest.mark.parametrize("form", ["grpo", "dapo"])
def test_equals_trl(form: str) -> None:
    batch = grpo_batch(4, 9, 8, 30)
    leaves = [batch[name].clone().requires_grad_() for name in ("hidden", "weight")]
    log_p = torch.log_softmax(leaves[0] @ leaves[1].T, -1)
    logp_BT = log_p.gather(1, batch["targets"][:, None]).view(4, 9)
    loss = trl_grpo_loss(
        logp_BT, batch["old"], batch["ref"], batch["advantage"], batch["mask"], 0.1, 0.2, 0.28, form
    )
    dx, dw = torch.autograd.grad(loss, leaves)
    assert_same(ours_on_grpo_batch(batch, form), {"loss": loss.detach(), "dx": dx, "dw": dw}, 1e-11)


@pytest.mark.parametrize("form", ["grpo", "dapo"])
def test_equals_liger(form: str) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    batch = grpo_batch(4, 9, 8, 30)
    leaves = [batch[name].clone().requires_grad_() for name in ("hidden", "weight")]
    liger = LigerFusedLinearGRPOLoss(
        beta=0.1,
        compiled=False,
        use_ref_model=True,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type=form,
    )
    loss, _ = liger(
        leaves[0].view(4, 9, 8), leaves[1], batch["targets"].view(4, 9), batch["mask"], batch["advantage"],
        ref_per_token_logps=batch["ref"], old_per_token_logps=batch["old"],
    )  # fmt: skip
    dx, dw = torch.autograd.grad(loss, leaves)
    want = {"loss": loss.detach().double(), "dx": dx, "dw": dw}
    assert_same(ours_on_grpo_batch(batch, form), want, 1e-6)


def test_reverse_gradient_is_that_of_the_kl_and_k1_is_noise() -> None:
    """Expectation over all classes, exactly: sum over targets of p * gradient of the estimator."""
    _, weight, _ = make_head(1, 8, 12, torch.float64)
    hidden, reference = torch.randn(1, 8).double(), torch.log_softmax(torch.randn(12).double(), 0)
    leaf = hidden.clone().requires_grad_()
    log_p = torch.log_softmax(leaf @ weight.T, -1)[0]
    p = log_p.exp()
    (want,) = torch.autograd.grad((p * (log_p - reference)).sum(), leaf)

    def expected_gradient(kl: str, form: str) -> Tensor:
        x = hidden.repeat(12, 1).requires_grad_()
        loss, _ = linear_policy_loss(
            x, weight, torch.arange(12), log_p.detach(), torch.zeros(12), row_weight_M=p.detach(),
            reference_logp_M=reference, kl_coef=1.0, kl=kl, kl_gradient=form,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return torch.autograd.grad(loss, x)[0].sum(0)

    for kl in ("k1", "k2", "k3"):
        torch.testing.assert_close(expected_gradient(kl, "reverse"), want[0])
    torch.testing.assert_close(expected_gradient("k2", "estimator"), want[0])
    torch.testing.assert_close(expected_gradient("k1", "estimator"), torch.zeros(8).double())
    assert (expected_gradient("k3", "estimator") - want[0]).abs().max() > 1e-3, "k3's is biased"


def test_far_away_policies_give_no_infinities() -> None:
    hidden, weight, targets = make_head(20, 8, 30)
    for shift in (-1e4, 1e4):
        far_M = linear_logprob_reference(hidden, weight, targets).logp_M + shift
        got = value_and_grads(
            lambda x, w, far_M=far_M: linear_policy_loss(
                x, w, targets, far_M, torch.randn(20), reference_logp_M=far_M, kl_coef=0.1
            ),
            hidden,
            weight,
        )
        assert all(bool(value.isfinite().all()) for value in got.values())


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_gradient", ["estimator", "reverse"])
@pytest.mark.parametrize("far", ["ratio", "kl"])
def test_gradients_beyond_the_clamp(far: str, kl: Any, kl_gradient: Any) -> None:
    """Rows whose exponent is beyond +-20 have the clamped term's value and not its gradient; the others have both."""
    hidden, weight, targets = make_head(12, 8, 30, torch.float64, ignored=False)
    logp_M = linear_logprob_reference(hidden, weight, targets).logp_M
    far_M = logp_M - torch.tensor([-25.0, 25.0, -20.5, 20.5, -19.5, 19.5, 0.1, -0.1] * 2)[:12]
    near_M = logp_M + 0.05
    old_M, reference_M = (far_M, near_M) if far == "ratio" else (near_M, far_M)
    arguments: dict[str, Any] = {
        "targets_M": targets, "old_logp_M": old_M, "reference_logp_M": reference_M, "kl_coef": 0.1,
        "advantage_M": torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -2.0, 2.0, 1.0, 1.0, -1.0, -1.0]),
        "kl": kl, "kl_gradient": kl_gradient,
    }  # fmt: skip
    for row in range(12):  # alone: one row's e^20 would hide another's gradient
        only_M = (torch.arange(12) == row).double()
        got, want = (
            value_and_grads(
                lambda x, w, op=op, only_M=only_M: op(x, w, row_weight_M=only_M, **arguments),
                hidden,
                weight,
            )
            for op in (linear_policy_loss, linear_policy_loss_reference)
        )
        for name in ("loss", "dx", "dw"):
            scale = max(1e-12, float(want[name].abs().max()))
            error = float((got[name] - want[name]).abs().max())
            assert error <= 1e-9 * scale, f"row {row}: {name}: {got[name]} vs {want[name]}"


def test_costs_three_gemms_with_entropy_too() -> None:
    hidden, weight, arguments = policy_inputs(30, 8, 40, {"entropy_coef": 0.1}, torch.float32)
    kept = int((arguments["targets_M"] != IGNORE).sum())
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    flops = gemm_flops(lambda: linear_policy_loss(*leaves, **arguments)[0].backward())
    assert flops == 3 * 2 * kept * 8 * 40


def test_main_grad_takes_dw() -> None:
    hidden, weight, arguments = policy_inputs(30, 8, 40, {"entropy_coef": 0.1}, torch.float32)
    want = value_and_grads(lambda x, w: linear_policy_loss(x, w, **arguments), hidden, weight)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    main_grad = torch.ones_like(weight)
    linear_policy_loss(*leaves, main_grad=main_grad, **arguments)[0].backward()
    assert weight.grad is None
    torch.testing.assert_close([main_grad, hidden.grad], [1 + want["dw"], want["dx"]])


def test_opcheck() -> None:
    hidden, weight, targets = make_head(9, 8, 20)
    values = [None, *(torch.rand(9) for _ in range(3)), None, torch.rand(9)]
    options = PolicyLoss(
        clip_low=0.2,
        clip_high=0.28,
        kl_coef=0.1,
        kl="k3",
        kl_gradient="estimator",
        entropy_coef=0.01,
        objective="clip",
        dual_clip=3.0,
    )
    args = (ConstantOptions.of(options), hidden, weight, targets, None, 1.0, values)
    torch.library.opcheck(compute_compiled, (*args, True, True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"old_logp_M": torch.zeros(5)},
            r"old_logp_M must have shape \(6,\), one per row, got \(5,\)",
        ),
        ({"advantage_M": torch.zeros(6, 1)}, r"advantage_M must have shape \(6,\)"),
        ({"kl": "k4"}, "expected kl in k1, k2, k3.*got 'k4'"),
        ({"kl_coef": 0.1}, "kl_coef 0.1 needs reference_logp_M"),
        ({"clip_low": 1.5}, r"expected clip_low in \[0, 1\]"),
        ({"objective": "ppo"}, "expected objective in clip, cispo, got 'ppo'"),
        ({"dual_clip": 1.0}, "expected dual_clip above 1, with objective clip, got 1.0 with clip"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "got 3.0 with cispo"),
        ({"targets_M": torch.full((6,), 20)}, r"targets_M\[0\] is 20"),
        ({"advantage_M": None}, "advantage_M must be a tensor, got NoneType"),
        *(
            ({name: torch.ones(6, requires_grad=True)}, f"{name} gets no gradient from this op")
            for name in (
                "old_logp_M",
                "advantage_M",
                "row_weight_M",
                "reference_logp_M",
                "importance_weight_M",
                "sequence_log_ratio_M",
            )  # fmt: skip
        ),
        (
            {"entropy_coef": float("nan")},
            "kl_coef and entropy_coef must be finite, got 0.0 and nan",
        ),
    ],
    ids=[
        "old",
        "advantage",
        "kl",
        "reference",
        "clip",
        "objective",
        "dual-clip",
        "dual-clip-cispo",
        "target",
        "no-advantage",
        *(f"gradient-{i}" for i in range(6)),
        "coefficient",
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    hidden, weight, targets = make_head(6, 8, 20, ignored=False)
    arguments: dict[str, Any] = {
        "hidden_MD": hidden, "weight_VD": weight, "targets_M": targets, "old_logp_M": torch.zeros(6),
        "advantage_M": torch.zeros(6),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"linear_policy_loss: .*{message}"):
        linear_policy_loss(**arguments | changes)
