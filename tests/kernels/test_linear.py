import os
import subprocess
import sys

import pytest
import torch
from numerics import DEVICE, check_against_reference

from phimini.kernels.linear import LIBRARIES, library, linear, linear_reference, matmul, outer


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 4), (3, 7, 5), (65, 33, 1), (64, 128, 512), (2, 5, 9, 3), (512, 16, 24), (300, 16, 24)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients(each_library: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *rows, K, N = shape
    inputs = {
        "x": torch.randn(*rows, K, device=DEVICE, dtype=dtype),
        "w_NK": torch.randn(N, K, device=DEVICE, dtype=dtype),
    }
    dy = torch.randn(*rows, N, device=DEVICE, dtype=dtype)
    check_against_reference(linear, linear_reference, inputs, dy)


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


@pytest.mark.parametrize("each_library", ["onednn"], indirect=True)
def test_few_shapes_reach_onednn(each_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes code for each: a training run of many lengths grew by a gigabyte."""
    module = sys.modules["phimini.kernels.linear"]  # a function of its name hides it
    shapes: set[tuple[torch.Size, torch.Size]] = set()
    product = module._product

    def counted(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        shapes.add((a.shape, w.shape))
        return product(a, w)

    monkeypatch.setattr(module, "_product", counted)
    w = torch.randn(24, 16, requires_grad=True)
    for rows in range(4, 1000, 7):
        linear(torch.randn(rows, 16, requires_grad=True), w).sum().backward()
    assert len(shapes) <= 3 * (4 + 6 + 2)


def test_only_what_is_needed_gets_a_gradient(each_library: str) -> None:
    x, w = torch.randn(8, 6), torch.randn(5, 6, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is None and w.grad is not None
    with torch.no_grad():
        assert not linear(x, w).requires_grad


def test_no_rows_and_one_row(each_library: str) -> None:
    w = torch.randn(5, 6)
    assert linear(torch.randn(0, 6), w).shape == (0, 5)
    x = torch.randn(6)
    torch.testing.assert_close(linear(x, w), w @ x)


def test_shapes_under_a_fake_mode(each_library: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.zeros(4, 8, 16), torch.zeros(32, 16, requires_grad=True)
        y = linear(x, w)
        assert y.shape == (4, 8, 32)
        y.sum().backward()
        assert w.grad is not None and w.grad.shape == (32, 16)


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
    code = "from phimini.kernels.linear import library; print(library())"
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
