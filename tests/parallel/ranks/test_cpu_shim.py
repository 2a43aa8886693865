"""The CPU shim changes only megatron-core's CUDA literals."""

import subprocess
import sys

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from phimini.parallel.ranks import cpu_shim

CPU_ONLY = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the shim is for machines without CUDA"
)


def outer(device="cuda", *, kinds=("torch.cuda.FloatTensor", "cuda:0")):
    def inner() -> tuple[str, bool]:
        return "cuda", device in ("cuda", "torch.cuda.HalfTensor")

    return inner(), kinds


def test_literals_are_replaced_in_code_defaults_and_nested_functions() -> None:
    cpu_shim._rewrite_function(outer)
    assert outer() == (("cpu", True), ("torch.FloatTensor", "cuda:0"))


@CPU_ONLY
def test_megatron_runs_on_the_cpu_and_torch_is_as_it_was() -> None:
    assert cpu_shim.is_installed()
    consts = schedules.forward_backward_no_pipelining.__code__.co_consts
    assert "cpu" in consts and "cuda" not in consts
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises(Exception, match="CUDA|NVIDIA"):
        torch.zeros(1, device="cuda")


def test_where_cuda_is_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_shim, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device, torch.Tensor.cuda, list(sys.meta_path)
    cpu_shim.install()
    assert (torch.cuda.current_device, torch.Tensor.cuda, list(sys.meta_path)) == before
    assert not cpu_shim.is_installed()


@CPU_ONLY
def test_modules_imported_before_the_shim_are_rewritten_in_place() -> None:
    program = (
        "from megatron.core.optimizer import clip_grads, optimizer\n"
        "assert 'cuda' in clip_grads.count_zeros_fp32.__code__.co_consts\n"
        "import phimini.parallel\n"
        "from megatron.core.pipeline_parallel import p2p_communication\n"
        "for f in (clip_grads.count_zeros_fp32, optimizer.FP32Optimizer.__init__):\n"
        "    assert 'cuda' not in f.__code__.co_consts and 'cpu' in f.__code__.co_consts, f\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)
