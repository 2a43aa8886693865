"""A full-size training step of any stage on synthetic tokens: timed on a GPU, counted on a machine without one.

    phimini bench step midtrain --model phi-4-mini --lengths 16384 --json step.jsonl

On a GPU, or with --timed, the step is run and timed (`timed_step.py`). Else it is counted, operation by operation:
kernels, bytes, FLOPs, peak, host time, and a predicted time. The step is the product's own, with every choice between
GPU and CPU made as on a GPU (`kernels/backend/launch.py`). Fake tensors carry shapes, Triton launches are recorded,
attention is one forward and one backward kernel. A call that reads a value on the host raises, so `synchronisations` is
0 of every step that comes to its end. A layer's numbers are the difference of a model with three layers and one with
two. The predicted time is the plan's: these counts over the rates of `parallel/plan/rates.py`. It is no measurement, and
a kernel's own inefficiencies are not in it.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from phimini.bench.gate.options import at_least_one, output_file, parser
from phimini.bench.system.fake_gpu import Kernel, Recorder, as_on_a_gpu
from phimini.bench.system.step_work import (
    STAGES,
    batch_of,
    head_of,
    lengths_for,
    lengths_of,
    pair_scratches_of,
    planned_peak_bytes,
)
from phimini.bench.system.timed_step import TimedStep, describe
from phimini.model.config import ModelConfig, head_flops_per_token, preset, training_flops
from phimini.model.io.json_files import write_rows
from phimini.parallel.attention import core
from phimini.parallel.megatron.builder import Recompute, build_model
from phimini.parallel.megatron.layers import provide_fused_wgrad
from phimini.parallel.plan.rates import GPUS, LAUNCH_S, Attention, table
from phimini.parallel.plan.step_time import Counts, layer_counts, outer_counts
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training import schedule, step
from phimini.parallel.training.step import start_step


# --- one step ------------------------------------------------------------------------------------
def traced(
    config: ModelConfig, stage: str, lengths: list[int], recompute: Recompute, layout: Layout
) -> Recorder:
    """Return what one micro-batch of `stage` launches and holds on one rank of `layout`."""
    batch, head = batch_of(stage, lengths, config.vocab_size), head_of(stage)
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
    batch = batch_of("midtrain", [8], config.vocab_size)
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
    arithmetic = layer_counts(config, layout, recompute, tokens, tokens // len(lengths))
    arithmetic = arithmetic * config.num_layers + outer_counts(
        config, layout, tokens, tokens, pair_scratches_of(stage)
    )
    flops = training_flops(config, torch.tensor([0, *lengths]).cumsum(0))
    return {
        "stage": stage, "model": name, "lengths": lengths, "layout": f"tensor={layout.tensor}", "recompute": recompute, "dtype": "bfloat16",
        "attention": attention, "kernels_per_layer": len(layer),
        "other_bytes_per_layer": sum(k.bytes for k in others),
        "head_small_kernels_per_chunk": round(small, 1), "head_chunks": chunks,
        "pageable_copies": shallow.pageable, "pinned_copies": shallow.pinned, "synchronisations": 0,
        "peak_bytes": deeper.peak_bytes + (config.num_layers - 3) * per_layer_bytes,
        "planned_peak_bytes": planned_peak_bytes(config, stage, tokens, recompute, layout=layout),
        "host_ms": round(host_ms(config.num_layers), 1), "predicted_step_ms": round(1e3 * seconds, 1),
        "predicted_mfu": round(flops / layout.tensor / seconds / gpu.peak_flops, 4),
        "counted": dataclasses.asdict(counted), "planned": dataclasses.asdict(arithmetic),
        "planned_ms": round(1e3 * (arithmetic.seconds(gpu, attention) + LAUNCH_S), 1), "rates": table(gpu, attention),
        "layer": dict(Counter(k.name for k in layer)),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Return 0; 1 where a stage failed, after the others."""
    options = parser("step", __doc__, json=False)
    options.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")  # fmt: skip
    options.add_argument("--model", default="phi-4-mini")
    options.add_argument(
        "--lengths", default="8192,8192", help="of a micro-batch's documents: 16384, 4x4096, lognormal(MEDIAN,SIGMA,TOKENS)"
    )  # fmt: skip
    options.add_argument("--recompute", default="selective", choices=("none", "selective", "full"))
    options.add_argument(
        "--attention", default="fa3", choices=("fa2", "fa3"),
        help="rates of the prediction: fa3 is Hopper's own, FlashAttention 3 or 4",
    )  # fmt: skip
    options.add_argument("--tensor", type=at_least_one, default=1, help="ranks that share each weight matrix; of a counted step")  # fmt: skip
    options.add_argument("--timed", action="store_true", help="time the step on a CPU too; take --model tiny")  # fmt: skip
    options.add_argument("--fp8", default="none", choices=("none", "emulate", "te"), help="of a timed step")  # fmt: skip
    options.add_argument("--rounds", type=at_least_one, default=4, help="timed steps")
    options.add_argument("--profile", type=Path, metavar="DIR", help="write the timed steps' traces here")  # fmt: skip
    options.add_argument("--json", type=output_file, help="write the rows here, as JSON lines")
    args = options.parse_args(arguments)
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        options.error(f"expected stages of {', '.join(STAGES)}, got {unknown[0]!r}")
    warnings.filterwarnings("ignore", category=UserWarning)
    return run(args, timed_rows if args.timed or torch.cuda.is_available() else counted_rows)


def run(args: Namespace, rows_of: Callable[[Namespace], Callable[[str, list[int]], Any]]) -> int:
    """Make the row of one stage after the other, and write all rows so far after each."""
    lengths, make, rows, failed = lengths_of(args.lengths), rows_of(args), [], False
    for stage in args.stages or STAGES:
        try:
            rows.append(make(stage, lengths_for(stage, lengths)))
        except RuntimeError as error:  # out of memory, or a loss that is not finite
            traceback.print_exc()
            print(f"{stage}: FAILED: {error}", flush=True)
            failed = True
        if args.json:
            write_rows(args.json, rows)
    return int(failed)


def timed_rows(args: Namespace) -> Callable[[str, list[int]], dict[str, Any]]:
    timed = TimedStep(args.model, args.recompute, args.fp8)

    def make(stage: str, lengths: list[int]) -> dict[str, Any]:
        row = timed.row(stage, lengths, args.rounds, args.profile)
        print(describe(row), flush=True)
        return row

    return make


def counted_rows(args: Namespace) -> Callable[[str, list[int]], dict[str, Any]]:
    if args.fp8 != "none":
        raise ValueError("bench step: --fp8 goes with a timed step: on a GPU, or --timed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(
            "bench step: unset TRITON_INTERPRET: launches are recorded, not interpreted"
        )
    layout = Layout(tensor=args.tensor, data=1, sequence_parallel=args.tensor > 1)

    def make(stage: str, lengths: list[int]) -> dict[str, Any]:
        row = row_of(stage, args.model, lengths, args.recompute, args.attention, layout)
        print(
            f"{stage:<12} {row['kernels_per_layer']} kernels and {row['other_bytes_per_layer'] / 1e9:.2f} GB a layer beside "
            f"products; head {row['head_small_kernels_per_chunk']} small kernels a chunk; peak {row['peak_bytes'] / 2**30:.2f} GiB "
            f"(planned {row['planned_peak_bytes'] / 2**30:.2f}); host {row['host_ms']:.0f} ms; predicted on an H100 "
            f"{row['predicted_step_ms']:.0f} ms, MFU {row['predicted_mfu']:.1%} ({row['attention']})",
            flush=True,
        )
        return row

    return make


if __name__ == "__main__":
    sys.exit(main())
