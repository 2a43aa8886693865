"""The full-size model on 64 and 1,024 ranks, each stage's step, without a byte of its weights.

One rank is run: fake tensors carry shapes and dtypes, a fake process group answers every collective. What is proven is
that each layout builds, runs forward and backward, and holds shards of the right shapes; no number is.
"""

import contextlib
import os
import resource
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from phimini.kernels import linear_cross_entropy
from phimini.model.config import preset
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import slots
from phimini.parallel.megatron.weight_names import hf_names, take_shard
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training import schedule
from phimini.parallel.training.batch import PackedBatch

PHI = preset("phi-4-mini")
# The paper's lengths (arXiv 2504.21233): 16k packed, 20k not packed, 16k pairs, 25k rollouts. Keys in a ring as on GPUs,
# and once gathered.
STAGES = {
    "midtrain": ([5000, 300, 11084], Layout(tensor=2, context=2, sequence_parallel=True, context_keys="ring")),
    "sft": ([20480], Layout(tensor=4, context=2, sequence_parallel=True)),
    "dpo": ([8000, 8000, 200, 184], Layout(tensor=4, pipeline=2, sequence_parallel=True)),
    "rlvr": ([25600], Layout(tensor=2, pipeline=2, virtual_pipeline=2, context=4, sequence_parallel=True,
                              context_keys="ring")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> None:
    """Replace the fixture of conftest, because fake tensors have no memory to poison."""


def fake_rank(lengths: list[int], layout: Layout, world_size: int, rank: int) -> dict:
    started, rss = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # It compares two random states, which fake tensors cannot; there is no dropout.
    megatron_random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()  # pyright: ignore
    schedule._check_ids = lambda *_: None  # it reads token ids, and fake tensors have none
    T = sum(lengths)
    tokens_T = torch.zeros(T, dtype=torch.int64)
    batch = PackedBatch(
        tokens_T=tokens_T, targets_T=tokens_T, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    )  # fmt: skip
    seen: list[tuple[int, ...]] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        world = initialize(layout, PHI)
        model = build_model(PHI, world, seed=None, dtype=torch.bfloat16)

        def on_hidden(index: int, prepared, hidden_TD: Tensor) -> tuple[Tensor, Tensor, dict]:
            hidden_MD = hidden_TD[prepared.head_rows]
            seen.append((*hidden_MD.shape, *model.head_weight_VD.shape))
            # As one operation: hundreds of chunks of fake tensors take a minute.
            with mock.patch("torch.compiler.is_compiling", return_value=True):
                loss, _ = linear_cross_entropy(
                    hidden_MD,
                    model.head_weight_VD,
                    prepared.batch.targets_T,
                    group=world.tensor_group,
                )
            return loss, torch.zeros((), dtype=torch.int32), {}

        model.zero_grad()
        schedule.run_schedule(model, [batch] * layout.pipeline, on_hidden, forward_only=False)
        wrong = []
        for slot in slots(model):
            whole = torch.empty(hf_names(PHI)[slot.hf_name], device="meta")
            shard = take_shard(whole, slot.split, world.tensor_rank, layout.tensor, PHI)
            if slot.parameter.shape != shard.shape or slot.parameter.main_grad.shape != shard.shape:  # pyright: ignore
                wrong.append((slot.hf_name, slot.parameter.shape, shard.shape))
    return dict(
        wrong=wrong,
        seen=seen,
        layers=sum(len(gpt.decoder.layers) for gpt in model.gpts),
        data_size=world.data_size,
        cpu_s=time.process_time() - started,
        grown_bytes=1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss),
    )


@pytest.mark.parametrize("world_size", [64, 1024])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_at_full_size(stage: str, world_size: int) -> None:
    lengths, layout = STAGES[stage]
    last = world_size - 1
    (found,) = run_ranks(fake_rank, 1, lengths, layout, world_size, last, timeout_s=400)
    assert found["wrong"] == []
    assert found["data_size"] == world_size // layout.model_size
    split = layout.layers_of_chunks(PHI)
    assert found["layers"] == sum(split[layout.pipeline - 1 :: layout.pipeline])
    rows = sum(lengths) // layout.context
    assert found["seen"] == [(rows, 3072, 200064 // layout.tensor, 3072)] * layout.pipeline
    assert found["cpu_s"] < 60
    assert found["grown_bytes"] < 2**30


def test_the_first_stage_runs_at_full_size() -> None:
    lengths, layout = STAGES["rlvr"]
    (found,) = run_ranks(fake_rank, 1, lengths, layout, 1024, 0, timeout_s=400)
    assert found["wrong"] == [] and found["seen"] == []
    assert found["layers"] == sum(layout.layers_of_chunks(PHI)[0::2])
