"""Fixtures of all tests. Tests run on the GPU if there is one; otherwise kernels run in Triton's interpreter."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._device import _device_constructors

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as in phimini/parallel/__init__.py
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated
torch.set_num_threads(1)
# torch.device("meta") remembers the constructors it finds at its first use: let it find the real ones.
_device_constructors()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill torch.empty* with NaN, so that an element that a kernel does not write fails the comparison."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def nan_filled(*args, _allocate=allocate, **kwargs):
            t = _allocate(*args, **kwargs)
            if t.is_floating_point() and not t.is_meta:
                t.detach().fill_(float("nan"))  # detached: a leaf that requires a gradient too
            return t

        monkeypatch.setattr(torch, name, nan_filled)


@pytest.fixture(autouse=True)
def no_process_group_in_this_process() -> Iterator[None]:
    """Fail the test that joins a process group outside a forked rank: no later test could fork any more."""
    yield
    from phimini.parallel.ranks import process

    joined, process.process_group_joined = process.process_group_joined, False
    assert not joined, "this test joined a process group in pytest's own process: use run_ranks"


@pytest.fixture(params=["mkl", "onednn"])
def each_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test with each library for fp32 products on a CPU."""
    from phimini.kernels.backend.cpu_gemm import library

    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        # right: then `library()` refuses onednn, and no product can reach it
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setenv("PHIMINI_CPU_GEMM", request.param)
    library.cache_clear()
    yield request.param
    library.cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
