"""Settings of vLLM's engine that follow from a run, and the signatures that it must have."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollout_cases import (
    LONG,
)
from vllm_process import in_vllm

from phimini.model.config import preset
from phimini.parallel.plan.layouts import plan_stage
from phimini.parallel.plan.rates import GPUS
from phimini.stages.config.recipes import phi4_mini_reasoning, tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout.engine import check_temperature
from phimini.stages.rollout.vllm_settings import (
    engine_arguments,
    engine_settings,
)
from phimini.stages.run.training import layout_of
from phimini.stages.run.workloads import workloads

pytestmark = pytest.mark.vllm


def test_the_recipe_sets_the_engines_length() -> None:
    run = override(tiny(), ["rollout.engine=vllm"])
    longest = max(run.rlvr.sequence_length, run.rollout_dpo.sequence_length)
    assert engine_settings(run, LONG, "inproc").max_model_len == longest
    with pytest.raises(ValueError, match=r"rollout\.max_model_len: 513 .* max_positions 512"):
        engine_settings(override(run, ["rollout.max_model_len=513"]), LONG, "inproc")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp8"):
            engine_settings(override(run, ["rollout.quantization=fp8"]), LONG, "inproc")


def test_on_a_gpu_batch_and_memory_share_are_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    run, phi = phi4_mini_reasoning(), preset("phi-4-mini")
    plan = plan_stage(phi, workloads(run)["rlvr"], GPUS["h100"], 8, layouts=[layout_of(run)])
    planned = plan.layouts[0].engine
    assert planned is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    total = GPUS["h100"].memory_bytes
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))  # fmt: skip
    layout = layout_of(run).resolve(8, phi)
    together = engine_settings(run, phi, "inproc", layout)
    assert (together.max_num_seqs, together.memory_share) == (
        planned.sequences,
        round(planned.share, 3),
    )
    assert together.kv_cache_bytes is None and together.tensor_parallel == 1
    # Twice as many with keys and values of one byte; the user's own numbers; a GPU of the engine's own.
    words = ["rollout.kv_cache_dtype=fp8"]
    assert engine_settings(override(run, words), phi, "inproc", layout).max_num_seqs == 66
    words = ["rollout.max_batch=48", "rollout.memory_share=0.4"]
    own = engine_settings(override(run, words), phi, "inproc", layout)
    assert (own.max_num_seqs, own.memory_share) == (48, 0.4)
    alone = engine_settings(run, phi, "ipc")
    assert (alone.max_num_seqs, alone.memory_share) == (62, 0.9)
    assert engine_arguments(together, "folder")["gpu_memory_utilization"] == together.memory_share


@pytest.mark.parametrize("field", ["rlvr.end_temperature", "evaluate.temperature"])
@pytest.mark.parametrize("value", [1e-3, 2.5])
def test_a_temperature_that_vllm_changes_is_refused(field: str, value: float) -> None:
    run = override(tiny(), ["rollout.engine=vllm", f"{field}={value}"])
    with pytest.raises(ValueError, match=rf"{field}={value:g}: vLLM samples at 0 or from 0.01 to"):
        engine_settings(run, LONG, "inproc")
    with pytest.raises(ValueError, match=f"^temperature={value:g}: vLLM samples at"):
        check_temperature("temperature", value)


def test_what_is_called_of_vllm_exists() -> None:
    calls = in_vllm(signatures)[0]
    assert calls["llm"] and calls["update"] == ["self", "update_info"]


def signatures() -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    inspect.signature(LLM.sleep).bind(None, level=2)
    inspect.signature(LLM.wake_up).bind(None)
    return {
        "llm": True,
        "update": list(inspect.signature(WeightTransferEngine.update_weights).parameters),
    }
