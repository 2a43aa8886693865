"""FP8 weights for the engine: values of the blocks, and the real vLLM on a CPU with an emulated matrix product."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from rollout_cases import (
    LONG,
    SAMPLING,
    SETTINGS,
    cases,
    difference,
    move,
    prompts,
    reference,
    sampled_by,
    tokens_of,
    trainer,
    weights,
)
from vllm_process import in_vllm

from phimini.bench.gate.peak_memory import AllocationMeter
from phimini.model.config import preset
from phimini.model.reference import Phi4Mini
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.weight_names import hf_names
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.weight_sync.deadline import WeightSyncError
from phimini.parallel.weight_sync.fp8_blocks import (
    BLOCK,
    SCALE_SUFFIX,
    check_blocks,
    dequantise_blocks,
    is_quantised,
    quantise_blocks,
    quantise_stream,
    quantised_names,
    working_bytes,
)
from phimini.parallel.weight_sync.sync import smallest_bucket
from phimini.stages.rl.mismatch import ALARM_LEVELS
from phimini.stages.rl.mismatch_diagnosis import Verdict, diagnose
from phimini.stages.rollout.engine import LocalEngine
from phimini.stages.rollout.vllm_settings import write_engine_config

# Every part of every linear is whole blocks.
CONFIG = dataclasses.replace(
    LONG, model_dim=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=256,
    short_factor=(1.0,) * 24, long_factor=tuple(1 + i / 8 for i in range(24)),
)  # fmt: skip


# --- the numbers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (300, 200), (4224, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_element_is_within_half_a_step_of_its_block(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    w_NK = (torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]).to(dtype)
    w8_NK, scale_IJ = quantise_blocks(w_NK)
    assert w8_NK.dtype == torch.float8_e4m3fn and w8_NK.shape == w_NK.shape
    assert scale_IJ.shape == (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    scale_NK = scale_IJ.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    scale_NK = scale_NK[: shape[0], : shape[1]]
    # e4m3: 3 bits of mantissa, subnormal below 2^-6, so half a step is 2^-4 of the number, at least 2^-10.
    limit_NK = torch.maximum(w_NK.float().abs() * 2**-4, scale_NK * 2**-10) * 1.001
    error_NK = (dequantise_blocks(w8_NK, scale_IJ) - w_NK.float()).abs()
    assert bool((error_NK <= limit_NK).all())


def test_each_block_uses_the_whole_range_and_zeros_stay_zero() -> None:
    w_NK = torch.randn(256, 256)
    w_NK[:128, 128:] = 0
    w8_NK, scale_IJ = quantise_blocks(w_NK)
    largest = w8_NK.float().abs().view(2, BLOCK, 2, BLOCK).amax((1, 3))
    assert largest.tolist() == [[448, 0], [448, 448]] and scale_IJ[0, 1] == 1
    again, same = quantise_blocks(dequantise_blocks(w8_NK, scale_IJ))
    assert torch.equal(again.view(torch.uint8), w8_NK.view(torch.uint8))
    torch.testing.assert_close(same, scale_IJ, rtol=1e-6, atol=0)


def test_the_stream_has_the_names_and_shapes_that_vllm_is_told() -> None:
    stream = {n: (tuple(t.shape), t.dtype) for n, t in quantise_stream(iter(weights(1).items()))}
    assert {n: shape for n, (shape, _) in stream.items()} == quantised_names(LONG)
    assert list(stream) == list(quantised_names(LONG))
    linears = [n for n in hf_names(LONG) if is_quantised(n)]
    assert len(linears) == 4 * LONG.num_layers
    for name, (_, dtype) in stream.items():
        expected = torch.float8_e4m3fn if name in linears else torch.float32
        assert dtype == expected, name


@pytest.mark.parametrize("shape", [(256, 256), (5000, 300)], ids=str)
def test_quantising_allocates_what_the_bucket_allows_for(shape: tuple[int, int]) -> None:
    w_NK = torch.randn(shape).bfloat16()
    with AllocationMeter() as meter:
        quantise_blocks(w_NK)
    assert meter.peak_bytes <= working_bytes(shape) * 1.02
    plain = smallest_bucket(CONFIG, torch.bfloat16, merging=False)
    fp8 = smallest_bucket(CONFIG, torch.bfloat16, merging=False, fp8=True)
    assert all((fp8[n] > plain[n]) == is_quantised(n) for n in plain)


def test_a_model_that_is_not_whole_blocks_is_refused_by_name() -> None:
    check_blocks(preset("phi-4-mini"), 8)
    with pytest.raises(ValueError, match="num_heads .* multiple of 128, got 192"):
        check_blocks(preset("phi-4-mini"), 16)
    with pytest.raises(ValueError, match="rollout.quantization=fp8"):
        check_blocks(preset("tiny"), 1)


def test_vllm_is_told_of_the_blocks(tmp_path: Path) -> None:
    write_engine_config(CONFIG, dataclasses.replace(SETTINGS, fp8=True), str(tmp_path))
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "fp8" and told["weight_block_size"] == [BLOCK, BLOCK]


# --- the guard -------------------------------------------------------------------------------------
class InFp8(LocalEngine):
    """The reference sampler with an FP8 engine's rounding."""

    def sync(self, model) -> None:
        super().sync(model)
        for name, p in self._model.named_parameters():
            if is_quantised(name):
                p.data.copy_(dequantise_blocks(*quantise_blocks(p.data)))


def examined(stale: bool) -> Verdict:
    """Return the findings of a read-back, with newer trainer weights if `stale`."""
    model = build_model(CONFIG, initialize(Layout(), CONFIG), seed=3)
    engine = InFp8(CONFIG, model.world, 16)
    engine.sync(model)
    if stale:
        move(model, 2)
    asked = prompts()
    done = sampled_by(engine, asked, SAMPLING, list(range(len(asked))))
    return diagnose(engine, model, cases(asked, done, SAMPLING.temperature))


def test_rounding_to_fp8_is_seen_and_named() -> None:
    verdict = run_ranks(examined, 1, False)[0]
    assert verdict.cause == "precision" and "FP8 weights" in verdict.detail, verdict.page()
    assert ALARM_LEVELS["float32"] < verdict.evidence[0].mean_abs


def test_stale_weights_are_not_taken_for_fp8() -> None:
    verdict = run_ranks(examined, 1, True)[0]
    assert verdict.cause == "stale weights", verdict.page()
    assert ALARM_LEVELS["fp8"] < verdict.evidence[0].mean_abs


# --- the real vLLM, with the product emulated -------------------------------------------------------
def emulate_the_kernel() -> None:
    """vLLM's FP8 kernel for CPUs needs AMX; here it is its definition. Everything before it is vLLM's own."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    def apply(self, layer, x, bias=None, **_):
        weight_NK = dequantise_blocks(layer.weight, layer.weight_scale_inv)
        return torch.nn.functional.linear(x.float(), weight_NK).to(x.dtype)

    kernel: Any = cpu.CPUFp8BlockScaledMMKernel
    kernel.is_supported = classmethod(lambda cls, compute_capability=None: (True, None))
    kernel.process_weights_after_loading = lambda self, layer: None
    kernel.apply_weights = apply


def in_fp8() -> dict[str, Any]:
    emulate_the_kernel()
    from phimini.stages.rollout.colocated_vllm import ColocatedVllm

    model = trainer(CONFIG, Layout(), 1)
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16", fp8=True)
    engine = ColocatedVllm(CONFIG, settings, model.world, 60.0)
    engine.sync(model)
    asked = prompts()
    done = sampled_by(engine, asked, SAMPLING, list(range(len(asked))))
    exact = reference(CONFIG, 1)
    rounded = Phi4Mini(CONFIG).eval()
    rounded.load_state_dict(exact.state_dict())
    for name, p in rounded.named_parameters():
        p.data = p.data.bfloat16().float()
        if is_quantised(name):
            p.data.copy_(dequantise_blocks(*quantise_blocks(p.data.bfloat16())))
    temperature = SAMPLING.temperature
    results = {
        "report": engine.last_sync,
        "with the blocks": difference(rounded, asked, done, temperature),
        "without": difference(exact, asked, done, temperature),
        "verdict": diagnose(engine, model, cases(asked, done, temperature), tolerance=0.3),
    }
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    network, load = worker.model_runner.get_model(), worker.model_runner.get_model().load_weights
    scales = "model.layers.0.mlp.down_proj" + SCALE_SUFFIX
    network.load_weights = lambda pairs: load([(n, t * 2 if n == scales else t) for n, t in pairs])
    with pytest.raises(WeightSyncError) as e:
        engine.sync(model)
    results["scales doubled"] = e.value
    del network.load_weights
    engine.sync(model)
    again = sampled_by(engine, asked, SAMPLING, list(range(len(asked))))
    results["recovered"] = [a == b for a, b in zip(tokens_of(again), tokens_of(done), strict=True)]
    return results


@pytest.mark.vllm
def test_vllm_loads_the_trainers_blocks_and_computes_with_them() -> None:
    found = in_vllm(in_fp8)[0]
    linears = sum(math.prod(s) for n, s in hf_names(CONFIG).items() if is_quantised(n))
    scales = sum(
        math.prod(s) for n, s in quantised_names(CONFIG).items() if n.endswith(SCALE_SUFFIX)
    )
    assert found["report"].bytes == 2 * CONFIG.num_parameters - linears + 4 * scales
    assert found["with the blocks"] < found["without"] / 2, "the engine's numbers are the blocks'"
    error = found["scales doubled"]
    assert (error.phase, error.tensor) == ("verify", "model.layers.0.mlp.down_proj.weight")
    assert all(found["recovered"])
    assert found["verdict"].cause in ("none", "precision"), found["verdict"].page()
