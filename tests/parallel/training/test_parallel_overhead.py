"""Overhead of Megatron-core on a CPU: CPU seconds of a step against the same step of the plain reference model.

Both with torch's own matrix products: a faster library on one side would hide what Megatron costs.

Opt-in (`PHIMINI_MEASURE=1 pytest -s tests/parallel/training/test_parallel_overhead.py`): timing belongs on a quiet machine.
"""

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import run_ranks
from torch import Tensor

from phimini.kernels.backend.cpu_gemm import library
from phimini.model.config import preset
from phimini.model.reference import Phi4Mini
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import Document, PackedBatch, next_token_targets, pack
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.training.step import forward_backward

TINY = preset("tiny")
ROWS, ROW_TOKENS = 6, 256
REPEATS = 15
pytestmark = [
    pytest.mark.optin,
    pytest.mark.skipif(not os.environ.get("PHIMINI_MEASURE"), reason="PHIMINI_MEASURE=1 measures"),
]


@pytest.fixture(autouse=True)
def the_same_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PHIMINI_CPU_GEMM", "mkl")
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> None:
    """Replace the fixture of conftest, because filling memory with NaN would count as time of the step."""


def rows_of_documents() -> list[list[Document]]:
    """Return six rows of 256 tokens, in documents of about 65."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(ROWS):
        cuts = [
            0,
            *(64 * i + int(torch.randint(-12, 13, (), generator=generator)) for i in (1, 2, 3)),
            ROW_TOKENS,
        ]
        row = []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            tokens = torch.randint(0, TINY.vocab_size, (b - a,), generator=generator).tolist()
            row.append(
                Document(tokens=tokens, targets=next_token_targets(tokens, [True] * (b - a)))
            )
        rows.append(row)
    return rows


def head(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group):
    logits_MV = hidden_MD @ weight_VD.T
    loss = F.cross_entropy(logits_MV, batch.targets_T, ignore_index=-100, reduction="sum")
    return loss, (batch.targets_T >= 0).sum(), {}


def cpu_seconds(micro_batches: list[PackedBatch]) -> tuple[float, float]:
    """Return (Megatron, plain): the best of REPEATS steps each, in turns."""
    world = initialize(Layout(), TINY)
    model = build_model(TINY, world, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, total_steps=1000))
    reference = Phi4Mini(TINY)
    reference.init_weights(0)
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    count = sum(int((b.targets_T >= 0).sum()) for b in micro_batches)

    def megatron() -> None:
        optimizer.zero_grad()
        forward_backward(model, micro_batches, head)
        optimizer.step()

    def plain() -> None:
        adamw.zero_grad()
        for b in micro_batches:
            hidden_MD = reference(b.tokens_T[None], cu_seqlens=b.cu_seqlens)[0]
            (head(hidden_MD, reference.head_weight_VD, b, group=None)[0] / count).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adamw.step()

    def measure(step: Callable[[], None]) -> float:
        began = time.process_time()
        step()
        return time.process_time() - began

    times = [(measure(megatron), measure(plain)) for _ in range(REPEATS + 3)][3:]
    return min(t for t, _ in times), min(t for _, t in times)


@pytest.mark.parametrize("form", ["one micro-batch", "six micro-batches"])
def test_a_step_costs_at_most_115_percent_of_the_plain_model_s(form: str) -> None:
    rows = rows_of_documents()
    packs = [pack(row) for row in rows] if form == "six micro-batches" else [pack(sum(rows, []))]
    ((megatron, plain),) = run_ranks(cpu_seconds, 1, packs, timeout_s=600)
    print(
        f"\n{form}: Megatron {megatron:.4f} CPU s, plain {plain:.4f}, ratio {megatron / plain:.2f}"
    )
    assert megatron <= 1.15 * plain
