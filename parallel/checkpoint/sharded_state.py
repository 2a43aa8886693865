"""State of model and optimizer in a checkpoint, as Megatron sharded tensors that any layout can read.

    model.<key>                          weights, in the parameters' dtype
    optimizer.exp_avg.<key>              AdamW's moments, fp32
    optimizer.exp_avg_sq.<key>
    optimizer.main.<key>                 fp32 masters, where the parameter itself is not fp32

Every optimizer (fp32, bf16 with masters, ZeRO-1) writes these same keys, each tensor whole up to its
tensor-parallel split. Megatron's own optimizer state dicts are not used: ZeRO-1's does not load into
torch's AdamW (KeyError 'step', and then one shared step tensor that grows once per parameter), does
not load into a plain optimizer, and gathers all of it on one data rank. Here a parameter's state is
assembled on the data rank that owns most of it, so that little data moves and every rank writes a part.

Keys and stacked layers are Megatron's. They come from our table of weight names and not from the
modules' `sharded_state_dict`, so any layer spec writes and reads the same file. Python objects are not
stored, so a load unpickles none. `_extra_state` (None, or FP8 scales that are recomputed) is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor, nn

from phimini.parallel.megatron.hf_weights import MegatronModel, Slot, plain, slots
from phimini.parallel.megatron.weight_names import LAYER_NAMES

_MOMENTS = ("exp_avg", "exp_avg_sq")
_EMBEDDING = "model.embed_tokens.weight"
_KEYS = {
    _EMBEDDING: "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
_LAYER_KEYS = {hf: megatron for megatron, (hf, _) in reversed(LAYER_NAMES.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """This rank's part of one parameter's optimizer state: elements [start, stop) of the flat parameter."""

    main: Tensor
    """the fp32 tensor that AdamW updates"""
    start: int
    stop: int
    state: dict[str, Any]
    group: dict[str, Any]
    step_in_group: bool
    """TE's FusedAdam counts steps per group, torch's AdamW per parameter"""

    def tensor(self, kind: str) -> Tensor:
        """Return the flat tensor of a kind: exp_avg, exp_avg_sq or main."""
        return (self.main.detach() if kind == "main" else self.state[kind]).view(-1)


def model_state(model: MegatronModel) -> dict[str, ShardedTensor]:
    """Return this rank's weights, to be saved or filled by a load; fp8 weights as bf16 copies."""
    num_replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    state = {}
    for i, slot in enumerate(slots(model)):
        # Replicas take turns to write: data rank j writes every j-th parameter.
        turn = (_data_rank() - i) % num_replicas
        state |= _sharded(f"{i}", slot, "", plain(slot.parameter), turn, model)
    return state


def optimizer_state(model: MegatronModel, optimizer: MegatronOptimizer) -> dict[str, ShardedTensor]:
    """Return the optimizer's state, to be saved. Collective over the data ranks, which assemble shards."""
    pieces = _pieces(optimizer)
    group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {}
    held = list(slots(model))
    ranges = _ranges([pieces.get(slot.parameter) for slot in held], group)
    for i, slot in enumerate(held):
        of_ranks, piece = ranges[:, i], pieces.get(slot.parameter)  # (data ranks, 2)
        sizes = of_ranks[:, 1] - of_ranks[:, 0]
        whole_everywhere = bool((sizes == slot.parameter.numel()).all())
        owner = i % group.size() if whole_everywhere else int(sizes.argmax())
        for kind in _kinds(slot.parameter):
            local = None if piece is None else piece.tensor(kind)
            if whole_everywhere:
                whole = local if group.rank() == owner else None
            else:
                whole = _put_together(local, of_ranks.tolist(), owner, group)
            if whole is not None:
                whole = whole.view(slot.parameter.shape)
                state |= _sharded(f"{kind}.{i}", slot, f"optimizer.{kind}.", whole, 0, model)
    return state


def optimizer_targets(
    model: MegatronModel, optimizer: MegatronOptimizer
) -> tuple[dict[str, ShardedTensor], dict[str, Tensor]]:
    """Return the tensors that a load fills: whole, fp32, on the host, for each parameter with a piece on this rank.

    The first result holds the sharded tensors; the second, for `apply_optimizer`, the tensors under them.
    """
    pieces = _pieces(optimizer)
    state, wholes = {}, {}
    for i, slot in enumerate(slots(model)):
        if slot.parameter not in pieces:
            continue
        for kind in _kinds(slot.parameter):
            whole = torch.empty(slot.parameter.shape, dtype=torch.float32)
            wholes[f"{kind}.{i}"] = whole
            state |= _sharded(f"{kind}.{i}", slot, f"optimizer.{kind}.", whole, 0, model)
    return state, wholes


@torch.no_grad()
def apply_model(model: MegatronModel, targets: dict[str, ShardedTensor]) -> None:
    """Finish a load of weights: quantise the fp8 ones again. All others were read in place."""
    for i, slot in enumerate(slots(model)):
        if is_float8tensor(slot.parameter):
            parts = [t.data for name, t in targets.items() if name.split("/")[0] == f"{i}"]
            slot.parameter.copy_(torch.cat([part for part in parts if part is not None]))


@torch.no_grad()
def apply_optimizer(
    model: MegatronModel, optimizer: MegatronOptimizer, wholes: dict[str, Tensor], step: int
) -> None:
    """Copy loaded tensors into the optimizer's pieces and set its step count."""
    pieces = _pieces(optimizer)
    for i, slot in enumerate(slots(model)):
        piece = pieces.get(slot.parameter)
        if piece is None:
            continue
        for kind in _kinds(slot.parameter):
            whole = wholes[f"{kind}.{i}"].view(-1)
            piece.tensor(kind).copy_(whole[piece.start : piece.stop])
        if piece.step_in_group:
            piece.group["step"] = step
        else:
            piece.state["step"] = torch.tensor(float(step))  # not shared: AdamW adds to it in place
    if any("main" in _kinds(slot.parameter) for slot in slots(model)):
        # Round the weights from the masters, as in training: the stored ones may be rounded to fp8 and these not, or the
        # other way round.
        for inner in _inner(optimizer):
            inner._copy_main_params_to_model_params()
        for chunk in model.chunks:
            if chunk.ddp_config.use_distributed_optimizer:  # pyright: ignore[reportAttributeAccessIssue]
                chunk.start_param_sync(force_sync=True)  # pyright: ignore[reportCallIssue]


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates that the optimizer has made."""
    steps = {
        int(p.group.get("step", 0) if p.step_in_group else p.state["step"])
        for p in _pieces(optimizer).values()
    }
    assert len(steps) <= 1, f"parameters disagree on the number of updates: {sorted(steps)}"
    return steps.pop() if steps else 0


def _pieces(optimizer: MegatronOptimizer) -> dict[nn.Parameter, Piece]:
    """Return this rank's piece of each model parameter. Creates AdamW's state before the first step."""
    pieces = {}
    for inner in _inner(optimizer):
        adam = inner.optimizer
        step_in_group = not isinstance(adam, torch.optim.Adam | torch.optim.AdamW)
        group_of = {id(p): group for group in adam.param_groups for p in group["params"]}
        for parameter, main, start, stop in _mains(inner):
            state = adam.state[main]
            for kind in _MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(main, dtype=torch.float32)
            if not step_in_group and "step" not in state:
                state["step"] = torch.tensor(0.0)
            pieces[parameter] = Piece(
                main=main,
                start=start,
                stop=stop,
                state=state,
                group=group_of[id(main)],
                step_in_group=step_in_group,
            )
    return pieces


def _mains(inner: Any) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
    """Yield (model parameter, fp32 tensor that AdamW updates, start, stop) of one Megatron optimizer."""
    if isinstance(inner, DistributedOptimizer):
        for parameter in inner.model_param_group_index_map:
            main = inner._get_main_param_and_optimizer_states(parameter)["param"]
            span = inner._get_model_param_range_map(parameter)["param"]
            yield parameter, main, span.start, span.end
    elif isinstance(inner, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(
            inner.float16_groups, inner.fp32_from_float16_groups, strict=True
        ):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0, parameter.numel()
        for parameters in inner.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, parameter, 0, parameter.numel()
    else:
        assert isinstance(inner, FP32Optimizer), f"unknown Megatron optimizer {type(inner)}"
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0, parameter.numel()


def _inner(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _kinds(parameter: nn.Parameter) -> tuple[str, ...]:
    is_master = parameter.dtype == torch.float32 and not is_float8tensor(parameter)
    return _MOMENTS if is_master else (*_MOMENTS, "main")


def _sharded(
    name: str, slot: Slot, prefix: str, tensor: Tensor, data_replica: int, model: MegatronModel
) -> dict[str, ShardedTensor]:
    """Return {name, or name/0 and name/1: place of `tensor` in the whole}, as views of `tensor`.

    Layers are stacked along a first axis, as Megatron does, so that any pipeline split can read them.
    """
    layer, suffix = None, None
    if slot.hf_name.startswith("model.layers."):
        _, _, number, suffix = slot.hf_name.split(".", 3)
        layer = (0, int(number), model.config.num_layers)
    key = prefix + (
        _KEYS[slot.hf_name] if suffix is None else f"decoder.layers.{_LAYER_KEYS[suffix]}"
    )
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    # A last stage that is not the first holds a copy of a tied embedding.
    is_copy = slot.hf_name == _EMBEDDING and parallel_state.get_pipeline_model_parallel_rank() > 0
    replica = (int(is_copy), tp_rank if slot.split == "whole" else 0, data_replica)
    first_axis = 0 if layer is None else 1
    if slot.split == "gate_up":  # the whole is [all gate | all up]
        places = [(first_axis, tp_rank, 2 * tp_size), (first_axis, tp_size + tp_rank, 2 * tp_size)]
        parts = {f"{name}/{j}": (part, places[j]) for j, part in enumerate(tensor.chunk(2))}
    elif slot.split == "whole":
        parts = {name: (tensor, None)}
    else:
        axis = first_axis + (1 if slot.split == "columns" else 0)
        parts = {name: (tensor, (axis, tp_rank, tp_size))}
    return {
        part_name: ShardedTensor.from_rank_offsets(
            key,
            part,
            *(offset for offset in (layer, place) if offset is not None),
            replica_id=replica,
            prepend_axis_num=first_axis,
        )
        for part_name, (part, place) in parts.items()
    }


def _data_rank() -> int:
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _ranges(pieces: list[Piece | None], group: Any) -> Tensor:
    """Return the first and last element of each flat parameter on each rank, (data ranks, parameters, 2)."""
    spans = [(0, 0) if p is None else (p.start, p.stop) for p in pieces]
    mine = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
    if group.size() == 1:
        return mine[None]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return torch.stack(everyone)


def _put_together(
    local: Tensor | None, ranges: list[list[int]], owner: int, group: Any
) -> Tensor | None:
    """Return the whole flat tensor on the host of group rank `owner`, and None elsewhere. Collective in `group`."""
    if group.rank() != owner:
        if local is not None and local.numel():
            dist.send(local.contiguous(), group=group, group_dst=owner)
        return None
    assert local is not None, "the owner holds the largest part"
    whole = torch.empty(max(stop for _, stop in ranges), dtype=local.dtype)
    for rank, (start, stop) in enumerate(ranges):
        if rank == owner:
            whole[start:stop].copy_(local)
        elif stop > start:
            received = torch.empty(stop - start, dtype=local.dtype, device=local.device)
            dist.recv(received, group=group, group_src=rank)
            whole[start:stop].copy_(received)
    return whole
