"""Default chunk sizes at the real vocabulary, and what a budget changes."""

import pytest
import torch
from head_cases import make_head

from phimini.kernels import linear_cross_entropy
from phimini.kernels.head.chunked import ChunkedHead
from phimini.kernels.head.rows import chunk_rows, chunk_slices

V = 200_064


def test_4096_rows_of_phi_4_mini_are_one_chunk_on_a_gpu() -> None:
    rows = chunk_rows("cuda", True, V * torch.bfloat16.itemsize, None)
    assert chunk_slices(4096, rows, 128) == [slice(0, 4096)]
    assert len(chunk_slices(8192, rows, 128)) == 2


@pytest.mark.parametrize(
    ("kind", "row_bytes", "chunk_bytes", "rows"),
    [
        ("cpu", 4 * V, None, 256),
        ("cpu", 4 * 256, None, 32768),
        ("cpu", 4 * V, 4 * V * 41, 41),
        ("cpu", 4 * V, 1, 16),
        ("cuda", 4 * V, 1, 16),
    ],
)
def test_rows_of_a_chunk(kind: str, row_bytes: int, chunk_bytes: int | None, rows: int) -> None:
    assert chunk_rows(kind, False, row_bytes, chunk_bytes) == rows


def test_the_default_reaches_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """At V = 140,000, 32 MiB of fp32 logits are 59 rows; 300 rows are two chunks of at most 256."""
    chunks: list[int] = []
    forward = ChunkedHead.forward

    def counted(self: ChunkedHead, rows: slice):
        chunks.append(rows.stop - rows.start)
        return forward(self, rows)

    monkeypatch.setattr(ChunkedHead, "forward", counted)
    hidden, weight, targets = make_head(300, 1, 140_000, ignored=False)
    linear_cross_entropy(hidden, weight, targets, with_entropy=False)
    assert sum(chunks) == 300 and len(chunks) == 2
