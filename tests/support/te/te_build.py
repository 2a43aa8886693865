"""Build of our model with Transformer Engine's layers; prints modules and calls as JSON: `te_build.py FOLDER`.

A process of its own, because megatron-core decides at its import whether there is a Transformer Engine. The layers are
the real ones up to their `forward`, which computes in the compiled half: here a double binds the call's arguments to
the real signature, notes them, and computes the same linear in fp32, so that a whole step runs. test_te.py judges.
"""

import inspect
import json
import sys
from dataclasses import replace
from typing import Any, get_args

import te_stub
import torch
import torch.nn.functional as F

te = te_stub.load(sys.argv[1])

# ruff: noqa: E402
from forked_ranks import run_ranks
from megatron.core import tensor_parallel
from torch import Tensor
from transformer_engine.common import recipe  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec  # pyright: ignore[reportMissingImports]

from phimini.model.config import ModelConfig
from phimini.model.reference import initial_weights
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.fp8 import Fp8
from phimini.parallel.megatron.fp8_emulated import Fp8Recipe
from phimini.parallel.megatron.hf_weights import from_hf, slots, to_hf
from phimini.parallel.megatron.layers import SwiGLU
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import Document, pack
from phimini.parallel.training.step import forward_backward

CONFIG = ModelConfig(
    num_layers=4, model_dim=256, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=512, vocab_size=128,
    max_positions=512, original_max_positions=512,
)  # fmt: skip
CAPABILITY = {"tensorwise": (9, 0), "blockwise": (9, 0), "mxfp8": (10, 0)}


def pretend_gpu(kind: Fp8Recipe) -> None:
    """Replace the checks of the machine that Transformer Engine makes before it accepts a recipe or makes a layer."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: CAPABILITY[kind]
    torch.cuda.get_device_properties = lambda *_: type(
        "P", (), {"major": CAPABILITY[kind][0], "minor": 0}
    )()
    torch.version.cuda = "13.0"
    te.distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    te.distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def double(kind: type, notes: list[dict[str, Any]]) -> None:
    """Replace `kind.forward` by plain torch, with the arguments bound to its signature."""
    signature = inspect.signature(kind.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = signature.bind(self, *args, **kwargs).arguments["inp"]
        fp8 = FP8GlobalStateManager.is_fp8_enabled()
        if fp8:
            assert_dim_for_fp8_exec(x, self.weight)
        opened = FP8GlobalStateManager.get_fp8_recipe() if fp8 else None
        group = FP8GlobalStateManager.get_fp8_group() if fp8 else None
        notes.append({
            "kind": kind.__name__, "shape": list(x.shape), "weight": list(self.weight.shape),
            "recipe": None if opened is None else type(opened).__name__,
            "format": None if opened is None else opened.fp8_format.name,
            "group": None if group is None else group.size(),
            "arguments": sorted(kwargs),
        })  # fmt: skip
        if hasattr(self, "layer_norm_weight"):
            x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        if self.parallel_mode == "column":
            region = (
                tensor_parallel.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else tensor_parallel.copy_to_tensor_model_parallel_region
            )
            return F.linear(region(x), self.weight)
        assert self.parallel_mode == "row", self.parallel_mode
        region = (
            tensor_parallel.reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else tensor_parallel.reduce_from_tensor_model_parallel_region
        )
        return region(F.linear(x, self.weight))

    kind.forward = forward


def head(hidden_MD: Tensor, weight_VD: Tensor, batch: Any, *, group: Any) -> Any:
    counts = (batch.targets_T >= 0).float()  # not the padding
    return (hidden_MD.square().sum(1) * counts).sum(), counts.sum(), {}


def rank(layout: Layout, fp8: Fp8 | None, recompute: Any = "none") -> dict[str, Any]:
    """Run one step; return names, shapes and attributes of the parameters, and the calls that `double` recorded."""
    notes: list[dict[str, Any]] = []
    world = initialize(layout, CONFIG)
    if fp8 is not None:
        pretend_gpu(fp8.recipe)
        double(te.LayerNormLinear, notes)
        double(te.Linear, notes)
    model = build_model(CONFIG, world, seed=None, fp8=fp8, recompute=recompute)
    weights = dict(initial_weights(CONFIG, 3))
    generator = torch.Generator().manual_seed(4)
    for name, tensor in weights.items():
        if tensor.ndim == 1:  # norms that are not all one
            weights[name] = tensor + torch.rand(tensor.shape, generator=generator)
    from_hf(model, weights)
    back = dict(to_hf(model))
    model.zero_grad()
    tokens = torch.randint(1, 128, (101,), generator=generator).tolist()
    documents = [
        Document(tokens=tokens[a:b], targets=tokens[a + 1 : b + 1]) for a, b in ((0, 40), (40, 100))
    ]
    batch = pack(documents, multiple_of=layout.token_multiple)
    swiglu_calls, swiglu = [0], SwiGLU.forward

    def counted(self: Any, gate_up: Tensor) -> Tensor:
        swiglu_calls[0] += 1
        return swiglu(self, gate_up)

    SwiGLU.forward = counted
    loss = forward_backward(model, [batch], head).loss
    SwiGLU.forward = swiglu
    layers = model.gpts[0].decoder.layers
    return {
        "loss": loss,
        "gradients": {s.hf_name: float(s.parameter.main_grad.norm()) for s in slots(model)},  # pyright: ignore[reportAttributeAccessIssue]
        "round_trip": sorted(n for n, t in weights.items() if not torch.equal(t, back[n])),
        "parameters": {
            name.removeprefix("chunks.0.decoder.layers."): [list(p.shape), getattr(p, "partition_dim", None), bool(getattr(p, "sequence_parallel", False))]
            for name, p in model.named_parameters()
            if ".layers." in name
        },
        "norms": [type(m).__name__ for m in (layers[0].input_layernorm, layers[0].pre_mlp_layernorm)],
        "saves_inputs": sorted(n for n, m in layers.named_modules() if getattr(m, "save_original_input", False)),
        "swiglu_calls": swiglu_calls[0],
        "head": type(model.gpts[0].output_layer).__mro__[1].__module__,
        "calls": notes,
    }  # fmt: skip


def kept_in_fp8(distributed_optimizer: bool, rounding: bool) -> dict[str, Any]:
    """Return the layers that have FP8 weights; with `rounding`, which is compiled code, return the error."""
    world = initialize(Layout(), CONFIG)
    pretend_gpu("blockwise")
    made: list[bool] = []
    make = TransformerEngineBaseModule.reset_parameters

    def note_and_make(self: Any, defer_init: bool = False) -> None:
        made.append(self.primary_weights_in_fp8)
        self.primary_weights_in_fp8 = rounding and self.primary_weights_in_fp8
        make(self, defer_init)

    TransformerEngineBaseModule.reset_parameters = note_and_make
    fp8 = Fp8(recipe="blockwise", emulate=False)
    try:
        model = build_model(
            CONFIG,
            world,
            fp8=fp8,
            dtype=torch.bfloat16,
            distributed_optimizer=distributed_optimizer,
        )
    except te_stub.CompiledCall as called:
        return {"made": made, "error": str(called)}
    chunk: Any = model.chunks[0]
    return {"made": made, "error": None, "gathered": chunk.ddp_config.fp8_param_gather}


SIGNATURES = {
    "Linear": lambda: te.Linear.__init__,
    "Linear.forward": lambda: te.Linear.forward,
    "LayerNormLinear": lambda: te.LayerNormLinear.__init__,
    "LayerNormLinear.forward": lambda: te.LayerNormLinear.forward,
    "fp8_autocast": lambda: te.fp8_autocast,
    "fp8_model_init": lambda: te.fp8_model_init,
    "checkpoint": lambda: te.distributed.checkpoint,
    "Float8CurrentScaling": lambda: recipe.Float8CurrentScaling,
    "Float8BlockScaling": lambda: recipe.Float8BlockScaling,
    "MXFP8BlockScaling": lambda: recipe.MXFP8BlockScaling,
}


def signatures() -> dict[str, list[list[Any]]]:
    """Return (name, kind, required) of every parameter of the functions that Megatron calls for us."""
    return {
        name: [
            [p.name, p.kind.name, p.default is p.empty]
            for p in inspect.signature(function()).parameters.values()
        ]
        for name, function in SIGNATURES.items()
    }


def main() -> None:
    found: dict[str, Any] = {"signatures": signatures()}
    for name, layout in (
        ("tp1", Layout()),
        ("tp2", Layout(tensor=2)),
        ("tp2 sp", Layout(tensor=2, sequence_parallel=True)),
    ):
        found[f"plain {name}"] = run_ranks(rank, layout.tensor, layout, None, timeout_s=240)
        for kind in get_args(Fp8Recipe) if layout.sequence_parallel else ("blockwise",):
            fp8 = Fp8(recipe=kind, emulate=False)
            aligned = replace(layout, token_alignment=fp8.token_alignment)
            found[f"{kind} {name}"] = run_ranks(rank, layout.tensor, aligned, fp8, timeout_s=240)
    fp8 = Fp8(recipe="tensorwise", emulate=False)
    for mode in ("full", "selective"):
        key = f"recomputed {mode}"
        found[key] = run_ranks(rank, 1, Layout(token_alignment=16), fp8, mode, timeout_s=240)
    for zero, rounding in ((True, False), (False, False), (True, True)):
        key = f"weights zero1={zero} rounding={rounding}"
        found[key] = run_ranks(kept_in_fp8, 1, zero, rounding, timeout_s=240)[0]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
