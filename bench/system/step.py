"""A full-size training step, operation by operation, on a machine without a GPU: kernels, bytes, FLOPs, peak, host time.

    phimini bench step midtrain --model phi-4-mini --lengths 16384 --json step.jsonl

The step is the product's own, with every choice between GPU and CPU made as on a GPU (`kernels/backend/launch.py`). Fake
tensors carry shapes, Triton launches are recorded, attention is one forward and one backward kernel. A call that reads a
value on the host raises, so `synchronisations` is 0 of every step that comes to its end. A layer's numbers
are the difference of a model with three layers and one with two. The predicted time is the plan's: these counts over the
rates of `parallel/plan/rates.py`. It is no measurement, and a kernel's own inefficiencies are not in it.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from phimini.bench.system.fake_gpu import Kernel, Recorder, as_on_a_gpu
from phimini.model.config import ModelConfig, head_flops_per_token, preset, training_flops
from phimini.model.io.json_files import write_rows
from phimini.parallel.attention import core
from phimini.parallel.megatron.builder import Recompute, build_model
from phimini.parallel.megatron.layers import provide_fused_wgrad
from phimini.parallel.plan.memory import MemoryOptions, memory_bytes
from phimini.parallel.plan.rates import GPUS, LAUNCH_S, Attention, table
from phimini.parallel.plan.step_time import Counts, layer_counts, outer_counts
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training import schedule, step
from phimini.parallel.training.batch import Document, PackedBatch, pack
from phimini.parallel.training.step import start_step
from phimini.stages.config.recipes import recipe_config
from phimini.stages.rl.loss import policy_head
from phimini.stages.rl.mismatch import MismatchMeter
from phimini.stages.rollout_dpo import dpo_head
from phimini.stages.run.training import cross_entropy_head
from phimini.stages.run.workloads import workloads

STAGES = ("midtrain", "sft", "rollout_dpo", "rlvr")


# --- one step ------------------------------------------------------------------------------------
def batch_of(stage: str, lengths: list[int]) -> PackedBatch:
    """Return a micro-batch of tokens 0 with the fields of `stage`; of pairs where the stage trains on pairs."""
    if stage == "rollout_dpo" and len(lengths) % 2:
        raise ValueError(f"bench step: rollout_dpo trains on pairs, got {len(lengths)} lengths")
    documents = []
    for i, n in enumerate(lengths):
        token_fields: dict[str, Any] = {}
        if stage == "rollout_dpo":
            token_fields = {"sequence": [i] * n}
        elif stage == "rlvr":
            names = ("old_logp", "advantage", "weight", "share", "temperature")
            token_fields = {name: [1.0] * n for name in names} | {"age": [0] * n}
        fields = {"reference_logp": 0.0, "weight": 1.0} if stage == "rollout_dpo" else {}
        documents.append(
            Document(
                tokens=[0] * n, targets=[0] * n, token_fields=token_fields, document_fields=fields
            )
        )
    return pack(documents)


def head_of(stage: str) -> Any:
    """Return the stage's head, as the paper's recipe sets it."""
    run = recipe_config("phi4_mini_reasoning")
    if stage == "rollout_dpo":
        return dpo_head(run.rollout_dpo)
    if stage == "rlvr":
        return policy_head(run.rlvr, MismatchMeter(), 0.0, "off")
    return cross_entropy_head


def traced(
    config: ModelConfig, stage: str, lengths: list[int], recompute: Recompute, layout: Layout
) -> Recorder:
    """Return what one micro-batch of `stage` launches and holds on one rank of `layout`."""
    batch, head = batch_of(stage, lengths), head_of(stage)
    core._tables.cache_clear()  # of tensors of another mode
    os.environ.update(WORLD_SIZE=str(layout.model_size), RANK="0")
    if layout.model_size > 1:  # `close` ends it
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.model_size)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        world = initialize(layout, config)
        model = build_model(config, world, seed=None, dtype=torch.bfloat16, recompute=recompute)
        for module in (module for gpt in model.gpts for module in gpt.modules()):
            if hasattr(module, "gradient_accumulation_fusion"):  # as on CUDA
                module.gradient_accumulation_fusion = True  # pyright: ignore[reportArgumentType]
        provide_fused_wgrad()
        recorder = Recorder(model)
        right = schedule._prepare

        def prepare(*args: Any) -> Any:
            with unset_fake_temporarily():
                prepared = right(*args)
                tables = prepared.documents.rope_tables
                assert tables is not None, "the schedule makes them"
                cos, sin = map(fake.from_tensor, tables)
                prepared.documents.rope_tables = cos, sin
            return prepared

        def marked(*args: Any, **kwargs: Any) -> Any:
            recorder.part = "head"
            result = head(*args, **kwargs)
            recorder.part = "backward"
            return result

        with (
            as_on_a_gpu(fake, recorder),
            patch.object(schedule, "_prepare", prepare),
            patch.object(schedule, "_check_ids", lambda *_: None),
            # Of dropout, which is 0; it compares states on the host.
            patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
            # No fake collective; what follows is once a step, not once a micro-batch.
            patch.object(step, "finalize_model_grads", recorder.end),
        ):
            model.zero_grad()
            with recorder:
                start_step(model, [batch], marked)
        world.close()
    core._tables.cache_clear()
    return recorder


@functools.cache
def host_ms(num_layers: int, rounds: int = 12) -> float:
    """Return the median process time, in ms, of the host's part of one micro-batch: forward and backward, tiny tensors.

    Launches do nothing, so what Triton and CUDA themselves take for a launch is not in it; a real GPU's host adds that.
    """
    config = dataclasses.replace(preset("tiny"), num_layers=num_layers)
    world = initialize(Layout(), config)
    model = build_model(config, world, seed=None, dtype=torch.float32)
    batch = batch_of("midtrain", [8])
    head = lambda hidden_MD, *_, **__: (hidden_MD.sum(), torch.ones(()), {})
    times = []
    with as_on_a_gpu(None, None), patch("torch.addmm", _no_product):
        for _ in range(rounds):
            started = time.process_time()
            model.zero_grad()
            start_step(model, [batch], head)
            times.append(time.process_time() - started)
    world.close()
    return 1e3 * sorted(times[3:])[(rounds - 3) // 2]


def _no_product(total: Tensor, *_: Any, **__: Any) -> Tensor:
    return total


# --- rows ----------------------------------------------------------------------------------------
def difference(larger: Recorder, smaller: Recorder) -> list[Kernel]:
    """Return the kernels of one layer: those that a model with a layer more launches more often."""
    rest, layer = Counter(smaller.kernels), []
    for kernel in larger.kernels:
        if rest[kernel]:
            rest[kernel] -= 1
        else:
            layer.append(kernel)
    return layer


def is_product(kernel: Kernel) -> bool:
    return kernel.flops > 0


def small_head_kernels(recorder: Recorder) -> int:
    """Return the number of the head's launches on vectors with an element per row."""
    head = [k for k in recorder.kernels if k.part == "head" and not is_product(k)]
    return sum(not k.name.startswith("_head") for k in head)


def counts_of(kernels: list[Kernel]) -> Counts:
    """Return the FLOPs and bytes of recorded kernels as the plan counts them, but for the products in the head's kernels."""
    counts = Counts()
    for k in kernels:
        if k.name.startswith("attention"):
            forward = k.name.endswith("fwd")
            counts += Counts(**{f"attention_{'forward' if forward else 'backward'}": k.flops})
        elif is_product(k):
            counts += Counts(**{"head_gradients" if k.part == "head" else "gemm": k.flops})
        elif k.name != "_head_logits_kernel":
            counts += Counts(bytes=k.bytes)
    return counts


def row_of(
    stage: str, name: str, lengths: list[int], recompute: Recompute, attention: Attention, layout: Layout
) -> dict[str, Any]:  # fmt: skip
    """Return the committed row of one case."""
    config = preset(name)
    trace = lambda layers, n: traced(
        dataclasses.replace(config, num_layers=layers), stage, n, recompute, layout
    )
    shallow, deeper = trace(2, lengths), trace(3, lengths)
    layer = difference(deeper, shallow)
    others = [k for k in layer if not is_product(k)]
    tokens = sum(lengths)
    chunks = sum(k.name == "_head_logits_kernel" for k in shallow.kernels)
    half = trace(2, [n // 2 for n in lengths])
    fewer = sum(k.name == "_head_logits_kernel" for k in half.kernels)
    small = (small_head_kernels(shallow) - small_head_kernels(half)) / max(1, chunks - fewer)
    logits = Counts(head_logits=tokens * head_flops_per_token(config) / layout.tensor)
    counted = counts_of(shallow.kernels) + counts_of(layer) * (config.num_layers - 2) + logits
    gpu = GPUS["h100"]
    seconds = counted.seconds(gpu, attention) + LAUNCH_S
    per_layer_bytes = deeper.peak_bytes - shallow.peak_bytes
    scratches = workloads(recipe_config("phi4_mini_reasoning"))[stage].pair_scratches
    planned = memory_bytes(
        config, layout, MemoryOptions(recompute=recompute, pair_scratches=scratches), tokens=tokens,
        num_microbatches=1,
    )["training"]  # fmt: skip
    arithmetic = layer_counts(config, layout, recompute, tokens, tokens // len(lengths))
    arithmetic = arithmetic * config.num_layers + outer_counts(
        config, layout, tokens, tokens, scratches
    )
    flops = training_flops(config, torch.tensor([0, *lengths]).cumsum(0))
    return {
        "stage": stage, "model": name, "lengths": lengths, "layout": f"tensor={layout.tensor}", "recompute": recompute, "dtype": "bfloat16",
        "attention": attention, "kernels_per_layer": len(layer),
        "other_bytes_per_layer": sum(k.bytes for k in others),
        "head_small_kernels_per_chunk": round(small, 1), "head_chunks": chunks,
        "pageable_copies": shallow.pageable, "pinned_copies": shallow.pinned, "synchronisations": 0,
        "peak_bytes": deeper.peak_bytes + (config.num_layers - 3) * per_layer_bytes,
        "planned_peak_bytes": planned["activations"] + planned["head"],
        "host_ms": round(host_ms(config.num_layers), 1), "predicted_step_ms": round(1e3 * seconds, 1),
        "predicted_mfu": round(flops / layout.tensor / seconds / gpu.peak_flops, 4),
        "counted": dataclasses.asdict(counted), "planned": dataclasses.asdict(arithmetic),
        "planned_ms": round(1e3 * (arithmetic.seconds(gpu, attention) + LAUNCH_S), 1), "rates": table(gpu, attention),
        "layer": dict(Counter(k.name for k in layer)),
    }  # fmt: skip


def lengths_of(text: str) -> list[int]:
    """Return the lengths of `16384`, `4x4096` or `8000,300`. Raises ValueError for other text."""
    try:
        parts = [part.split("x") for part in text.split(",")]
        lengths = [int(part[-1]) for part in parts for _ in range(int(part[0]) if part[1:] else 1)]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise ValueError(
            f"bench step: lengths: expected numbers as 16384, 4x4096 or 8000,300, got {text!r}"
        )
    return lengths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="phimini bench step", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all"
    )
    parser.add_argument("--model", default="phi-4-mini")
    parser.add_argument(
        "--lengths",
        default="8192,8192",
        help="of a micro-batch's documents, e.g. 16384 or 4096,4096",
    )
    parser.add_argument("--recompute", default="selective", choices=("none", "selective", "full"))
    parser.add_argument(
        "--attention", default="fa3", choices=("fa2", "fa3"), help="rates of the prediction"
    )
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share each weight matrix")
    parser.add_argument("--json", type=Path, help="write the rows here, as JSON lines")
    options = parser.parse_args(arguments)
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"bench step: expected stages of {', '.join(STAGES)}, got {unknown[0]!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(
            "bench step: unset TRITON_INTERPRET: launches are recorded, not interpreted"
        )
    warnings.filterwarnings("ignore", category=UserWarning)
    lengths = lengths_of(options.lengths)
    size = options.tensor
    layout = Layout(tensor=size, data=1, sequence_parallel=size > 1)
    rows = []
    for stage in options.stages or STAGES:
        row = row_of(stage, options.model, lengths, options.recompute, options.attention, layout)
        rows.append(row)
        print(
            f"{stage:<12} {row['kernels_per_layer']} kernels and {row['other_bytes_per_layer'] / 1e9:.2f} GB a layer beside "
            f"products; head {row['head_small_kernels_per_chunk']} small kernels a chunk; peak {row['peak_bytes'] / 2**30:.2f} GiB "
            f"(planned {row['planned_peak_bytes'] / 2**30:.2f}); host {row['host_ms']:.0f} ms; predicted on an H100 "
            f"{row['predicted_step_ms']:.0f} ms, MFU {row['predicted_mfu']:.1%} ({row['attention']})",
            flush=True,
        )
    if options.json:
        write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
