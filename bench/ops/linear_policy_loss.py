"""Bench cases of the head's policy loss: timed. Its kernels are cross-entropy's."""

from collections.abc import Callable

import torch
from torch import Tensor

from phimini.bench.ops._head import head_case, head_inputs, logps, shapes
from phimini.bench.ops.harness import Case
from phimini.kernels import linear_policy_loss

KL_COEF, ENTROPY_COEF = 0.04, 0.01
FORMS = ("", "_entropy_metric", "_entropy_bonus")


def timed_cases(device: str, quick: bool) -> list[Case]:
    """Return GRPO with the k3 penalty: without the entropy, with it as a metric, and with it in the loss."""
    cases = []
    for shape in shapes(device, quick):
        inputs = head_inputs(*shape, device)
        for form in FORMS:
            eager, ours = _providers(shape, device, form)
            cases.append(
                head_case(
                    f"linear_policy_loss{form}", shape, inputs, eager, ours, ("fwd", "fwd+bwd")
                )
            )
    return cases


def _providers(shape: tuple[int, int, int], device: str, form: str) -> tuple[Callable, Callable]:
    M, _, V = shape
    targets = torch.randint(0, V, (M,), device=device)
    advantage = torch.randn(M, device=device)
    old, reference = (0.3 * torch.randn(M, device=device) - 11 for _ in range(2))

    def eager(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        log_p, logp = logps(hidden, weight, targets)
        # log-probs differ from `old` by more than the clip, so that both branches occur
        ratio, d = (logp - old).exp(), logp - reference
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        loss = (loss + KL_COEF * ((-d).exp() + d - 1)).sum()
        if form == "_entropy_metric":
            with torch.no_grad():
                return loss, -(log_p.exp() * log_p).sum()
        if form == "_entropy_bonus":
            loss = loss + ENTROPY_COEF * (log_p.exp() * log_p).sum()
        return (loss,)

    def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        loss, metrics = linear_policy_loss(
            hidden, weight, targets, old, advantage, reference_logp_M=reference, kl_coef=KL_COEF,
            entropy_coef=ENTROPY_COEF if form == "_entropy_bonus" else 0.0, with_entropy=form == "_entropy_metric",
        )  # fmt: skip
        return (loss, metrics.entropy_sum) if form == "_entropy_metric" else (loss,)

    return eager, ours
