"""Bench cases of the head's DPO loss: timed. Its kernels are cross-entropy's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from phimini.bench.ops._head import head_case, head_inputs, logps, shapes
from phimini.bench.ops.harness import Case
from phimini.kernels import linear_dpo

NUM_PAIRS = 4


def timed_cases(device: str, quick: bool) -> list[Case]:
    """Return four pairs of equally long answers. A chunk holds one pair on a GPU, and part of a pair on a CPU."""
    cases = []
    for shape in shapes(device, quick):
        M, _, V = shape
        targets = torch.randint(0, V, (M,), device=device)
        sequence = torch.arange(M) // (M // (2 * NUM_PAIRS))
        reference_S = torch.full((2 * NUM_PAIRS,), -10.0 * M / (2 * NUM_PAIRS), device=device)

        def eager(
            hidden: Tensor,
            weight: Tensor,
            targets: Tensor = targets,
            reference_S: Tensor = reference_S,
        ) -> Tensor:
            sums_S = logps(hidden, weight, targets)[1].view(2 * NUM_PAIRS, -1).sum(1) - reference_S
            return -F.logsigmoid(0.1 * (sums_S[::2] - sums_S[1::2])).sum()

        def ours(
            hidden: Tensor, weight: Tensor, targets: Tensor = targets, sequence: Tensor = sequence,
            reference_S: Tensor = reference_S,
        ) -> Tensor:  # fmt: skip
            return linear_dpo(hidden, weight, targets, sequence, reference_S)[0]

        inputs = head_inputs(*shape, device)
        cases.append(head_case("linear_dpo", shape, inputs, eager, ours, ("fwd", "fwd+bwd")))
    return cases
