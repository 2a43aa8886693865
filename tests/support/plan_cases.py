"""Workloads of the paper's recipe and a counter of the bytes that autograd keeps."""

import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from phimini.model.config import ModelConfig, preset
from phimini.parallel.attention.core import rope_tables
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.plan.engine import Engine
from phimini.parallel.plan.memory import (
    Recompute,
)
from phimini.parallel.plan.workload import Workload
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import Document, PackedBatch, pack
from phimini.parallel.training.step import forward_backward

PHI = preset("phi-4-mini")


MIDTRAIN = Workload(stage="midtrain", sequence_length=16384, rows_per_step=128)


CONFIG = ModelConfig(
    num_layers=4, model_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=96, vocab_size=128,
    max_positions=1024, original_max_positions=1024,
)  # fmt: skip


TOKENS = 512


# --- two phases ----------------------------------------------------------------------------------
RLVR = Workload(
    stage="rlvr", sequence_length=25600, rows_per_step=128, engine=Engine(longest=25600)
)


# --- measured on the CPU -------------------------------------------------------------------------
def sum_of_squares(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return hidden_MD.square().sum() + 0 * weight_VD.sum(), torch.tensor(1), {}


class Allocated(TorchDispatchMode):
    """Mode that records, by weak references, every storage that an operation returns."""

    def __init__(self, but: Iterable[Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.others = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                known = self.storages.get(storage._cdata)
                new = known is None or known[0].expired()
                if new and storage._cdata not in self.others:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def alive_bytes(self) -> int:
        return sum(nbytes for ref, nbytes in self.storages.values() if not ref.expired())


def kept_bytes(world: World, recompute: Recompute) -> int:
    """Return the live bytes on this rank between forward and backward, without the model."""
    model = build_model(CONFIG, world, recompute=recompute)
    alive: list[int] = []

    def head(hidden_MD: Tensor, *args, **kwargs):
        time.sleep(0.1)  # gloo's thread lets go of what it reduced when it next gets to run
        alive.append(allocated.alive_bytes)
        return sum_of_squares(hidden_MD, *args, **kwargs)

    tokens = [i % CONFIG.vocab_size for i in range(TOKENS)]
    batch = pack([Document(tokens=tokens, targets=tokens)])
    rope_tables(CONFIG, TOKENS, world.device)  # keeps a table
    with Allocated(but=(p for _, p in model.named_parameters())) as allocated:
        forward_backward(model, [batch], head)
    return alive[0]
