"""A CPU's matrix products: the library that is chosen, all strides, all numbers of rows."""

import os
import subprocess
import sys

import pytest
import torch

from phimini.kernels.backend.cpu_gemm import LIBRARIES, library, matmul, outer


def test_it_is_the_library_that_is_asked_for(each_library: str) -> None:
    a = torch.randn(8, 16)
    profile = torch.autograd.profiler.profile()
    with profile:
        matmul(a, torch.randn(16, 4))
    events = profile.function_events
    assert events is not None, "the profiler ran"
    names = {event.name for event in events}
    assert ("mkldnn::_linear_pointwise" in names) == (each_library == "onednn")
    assert ("aten::mm" in names) == (each_library == "mkl")


@pytest.mark.parametrize("kind", ["plain", "transposed", "columns", "rows", "expanded"])
def test_any_strides_on_either_side(each_library: str, kind: str) -> None:
    """A strided right side is the one that oneDNN computes in its reference code."""
    make = {
        "plain": lambda m, n: torch.randn(m, n),
        "transposed": lambda m, n: torch.randn(n, m).t(),
        "columns": lambda m, n: torch.randn(m, 2 * n)[:, 3 : 3 + n],
        "rows": lambda m, n: torch.randn(2 * m, n)[::2],
        "expanded": lambda m, n: torch.randn(1, n).expand(m, n),
    }[kind]
    for a, b in ((make(9, 12), torch.randn(12, 7)), (torch.randn(9, 12), make(12, 7))):
        torch.testing.assert_close(matmul(a, b), (a.double() @ b.double()).float())


@pytest.mark.parametrize("rows", [1, 5, 100, 256, 300, 512, 777])
def test_a_weights_gradient_of_any_number_of_rows(each_library: str, rows: int) -> None:
    a, b = torch.randn(rows, 24), torch.randn(rows, 7)
    torch.testing.assert_close(
        outer(a, b), (a.double().t() @ b.double()).float(), atol=1e-4, rtol=1e-5
    )
    wide, tall = torch.randn(rows, 60)[:, 5:29], torch.randn(7, rows).t()
    torch.testing.assert_close(
        outer(wide, tall), (wide.double().t() @ tall.double()).float(), atol=1e-4, rtol=1e-5
    )


def test_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMINI_CPU_GEMM", "openblas")
    library.cache_clear()
    with pytest.raises(
        ValueError, match="PHIMINI_CPU_GEMM must be one of mkl, onednn; got 'openblas'"
    ):
        library()
    library.cache_clear()


def test_the_choice_needs_no_timing() -> None:
    """Two fresh processes, one choice."""
    code = "from phimini.kernels.backend.cpu_gemm import library; print(library())"
    environment = {k: v for k, v in os.environ.items() if k != "PHIMINI_CPU_GEMM"}
    names = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert len(names) == 1 and names.pop().strip() in LIBRARIES
