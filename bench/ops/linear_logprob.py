"""Bench cases of the head's log-probs: timed, compiled and counted."""

import torch
from torch import Tensor

from phimini.bench.ops._head import head_case, head_inputs, logps, matmul_static_cases, shapes
from phimini.bench.ops.cases import StaticCase, TrafficCase
from phimini.bench.ops.harness import Case
from phimini.kernels import linear_logprob


def timed_cases(device: str, quick: bool) -> list[Case]:
    """Return the forward alone, as for old and reference log-probs, with the entropy and without."""
    cases = []
    for shape in shapes(device, quick):
        targets = torch.randint(0, shape[2], shape[:1], device=device)

        def eager(hidden: Tensor, weight: Tensor, targets: Tensor = targets) -> Tensor:
            return logps(hidden, weight, targets)[1]

        def eager_entropy(
            hidden: Tensor, weight: Tensor, targets: Tensor = targets
        ) -> tuple[Tensor, Tensor]:
            log_p, logp = logps(hidden, weight, targets)
            return logp, -(log_p.exp() * log_p).sum(-1)

        def ours(hidden: Tensor, weight: Tensor, targets: Tensor = targets) -> Tensor:
            return linear_logprob(hidden, weight, targets, with_entropy=False).logp_M

        def ours_entropy(
            hidden: Tensor, weight: Tensor, targets: Tensor = targets
        ) -> tuple[Tensor, Tensor]:
            out = linear_logprob(hidden, weight, targets)
            return out.logp_M, out.entropy_M

        inputs = head_inputs(*shape, device)
        cases += [
            head_case("linear_logprob", shape, inputs, eager, ours, ("fwd",)),
            head_case(
                "linear_logprob_entropy", shape, inputs, eager_entropy, ours_entropy, ("fwd",)
            ),
        ]
    return cases


def static_cases() -> list[StaticCase]:
    return matmul_static_cases("fwd")


def traffic_cases() -> list[TrafficCase]:
    """Return the forward; each block of rows reads the weight's tiles again, which a GPU does from L2."""
    M, D, V = 256, 64, 4160
    hidden, weight = torch.randn(M, D).bfloat16(), torch.randn(V, D).bfloat16()
    targets = torch.randint(0, V, (M,))
    return [
        TrafficCase(
            kernel="linear_logprob",
            run=lambda: linear_logprob(hidden, weight, targets, _backend="triton"),
            minimum_bytes=(M * D + V * D) * 2 + M * 20,
        )
    ]
