"""Checkpoints of FP8 weights by Transformer Engine's real tensor classes, cast and optimizer: `te_checkpoint.py TE FOLDER`.

What they compute in compiled code (a cast, an amax, AdamW) is computed here in plain torch, so the numbers are a
double's; which tensor is saved, what it is made from again and into what it is loaded is the real Python of Transformer
Engine and of Megatron's distributed optimizer. test_fp8_checkpoint.py judges the JSON that this prints.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import te_stub
import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


# --- doubles of compiled functions ---------------------------------------------------------------
def quantize(src: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """Quantize per tensor. A Float8Quantizer has its scale; one with current scaling computes it from the values."""
    dtype = TE_DType_To_Torch[quantizer.dtype]
    scale = getattr(quantizer, "scale", None)
    if scale is None:
        scale = LARGEST[dtype] / src.detach().abs().amax().float()
    data = (src.detach().float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    data, scale_inv = data.view(torch.uint8), (1 / scale).reshape(1)
    if out is None:
        return Float8Tensor(
            shape=src.shape, dtype=src.dtype, data=data, fp8_scale_inv=scale_inv, fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
        )  # fmt: skip
    out._data.copy_(data.view(out._data.shape))
    out._scale_inv.copy_(scale_inv)
    return out


def compute_amax(x: Tensor, out: Tensor) -> None:
    if x.numel():
        out.copy_(x.abs().amax())


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], largest: float, pow_2: bool, epsilon: float
) -> None:
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(largest / amax)
        scale_inv.copy_(1 / scale)


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], *_: Any) -> Any:
    return torch.stack([x.float().norm() for x in lists[0]]).norm(), None


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, step: int,
    adam_w: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    assert adam_w and bias_correction
    for gradient, p, m, v in zip(*lists, strict=True):
        m.lerp_(gradient.float(), 1 - beta1)
        v.lerp_(gradient.float().square(), 1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p))


DOUBLES = [
    quantize, compute_amax, multi_tensor_compute_scale_and_scale_inv, multi_tensor_scale, multi_tensor_l2norm,
    multi_tensor_adam,
]  # fmt: skip
te = te_stub.load(sys.argv[1], {function.__name__: function for function in DOUBLES})

# ruff: noqa: E402
from forked_ranks import run_ranks
from megatron.core.distributed import param_and_grad_buffer
from transformer_engine.pytorch.constants import TE_DType_To_Torch  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor  # pyright: ignore[reportMissingImports]

import phimini.parallel.ranks.cpu_shim as cpu_shim
from phimini.model.config import ModelConfig
from phimini.parallel.checkpoint.save_load import load_checkpoint, save_checkpoint
from phimini.parallel.checkpoint.sharded_state import _pieces
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.fp8 import Fp8
from phimini.parallel.megatron.hf_weights import slots
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.optimizer import Optimizer, OptimizerConfig, build_optimizer

CONFIG = ModelConfig(
    num_layers=4, model_dim=64, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=128, vocab_size=64, max_positions=64,
    original_max_positions=64,
)  # fmt: skip
FP8 = Fp8(recipe="tensorwise", emulate=False)
CAPABILITY = (10, 0)  # no transposed copies of the weights


def pretend_gpu() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.cuda.get_device_properties = lambda *_: type("P", (), {"major": 10, "minor": 0})()
    torch.version.cuda = "13.0"
    te.distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    te.distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cpu_shim._rewrite_function(FusedAdam.__init__)
    # Megatron gathers FP8 and bf16 buckets in one coalesced call. NCCL groups the two; gloo joins them into one tensor
    # of one dtype, and bytes become numbers.
    param_and_grad_buffer._coalescing_manager = lambda *_, **__: contextlib.nullcontext()  # pyright: ignore


def build(layout: Layout, fp8: Fp8 | None, seed: int) -> tuple[Model, Optimizer]:
    world = initialize(layout, CONFIG)
    pretend_gpu()
    model = build_model(
        CONFIG, world, seed=seed, fp8=fp8, dtype=torch.bfloat16, distributed_optimizer=True
    )
    torch.cuda.is_available = lambda: False  # what follows is ours, which asks where it runs
    config = OptimizerConfig(lr=1e-2, total_steps=10, clip=0.0)
    return model, build_optimizer(model, config, distributed=True)


def update(model: Model, optimizer: Optimizer, steps: int) -> None:
    """Update with gradients that do not depend on the history of layouts."""
    for step in range(steps):
        optimizer.zero_grad()
        for slot in slots(model):
            gradient: Any = slot.parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
            generator = torch.Generator().manual_seed(hash((slot.hf_name, step)) % 2**31)
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
        optimizer.step()


def state(model: Model, optimizer: Optimizer) -> dict[str, Any]:
    """Return the weight and the master of each parameter, as sums that distinguish states, or whole if small."""
    pieces = _pieces(optimizer.megatron)
    found = {}
    for slot in slots(model):
        p, piece = slot.parameter, pieces.get(slot.parameter)
        weight = p.dequantize() if isinstance(p, Float8Tensor) else p
        found[slot.hf_name] = {
            "class": type(p).__name__ if isinstance(p, Float8Tensor) else str(p.dtype),
            "weight": digest(weight.detach()),
            "master_rounds_to_weight": piece is not None
            and bool(torch.equal(as_weight(piece.tensor("main").view(p.shape), p), weight.detach())),
            "master": None if piece is None else digest(piece.tensor("main")),
            "moments": None if piece is None else [digest(piece.tensor(k)) for k in ("exp_avg", "exp_avg_sq")],
            "step": None if piece is None else int(piece.group.get("step", -1)),
        }  # fmt: skip
    return found


def as_weight(master: Tensor, p: Any) -> Tensor:
    """Return the model's weight for an fp32 master: rounded to bf16, and for FP8 weights then to FP8."""
    if not isinstance(p, Float8Tensor):
        return master.to(p.dtype)
    return quantize(master.to(p.dtype), p._get_quantizer()).dequantize(dtype=p.dtype)


def digest(x: Tensor) -> str:
    """Return a digest that is equal for equal bits."""
    flat = x.detach().contiguous().view(-1)
    return str(hash(flat.view(torch.uint8).numpy().tobytes()))


def extra_states(model: Model) -> list[int]:
    """Return the bytes of each `_extra_state` in the model's state dict."""
    return [
        0 if value is None else int(torch.as_tensor(value).numel())
        for gpt in model.gpts
        for name, value in gpt.state_dict().items()
        if name.endswith("_extra_state")
    ]


def save(layout: Layout, fp8: Fp8 | None, folder: str) -> dict[str, Any]:
    model, optimizer = build(layout, fp8, seed=3)
    update(model, optimizer, 2)
    save_checkpoint(folder, 2, model, optimizer)
    return {"state": state(model, optimizer), "extra": extra_states(model)}


def load(layout: Layout, fp8: Fp8 | None, folder: str, again: str | None = None) -> dict[str, Any]:
    model, optimizer = build(layout, fp8, seed=8)
    before = state(model, optimizer)
    load_checkpoint(folder, model, optimizer)
    if again is not None:
        save_checkpoint(again, 2, model, optimizer)
    return {"before": before, "state": state(model, optimizer)}


def main() -> None:
    folder = Path(sys.argv[2])
    one, two = Layout(token_alignment=16), Layout(tensor=2, token_alignment=16)
    plain = Layout()
    ranks = lambda fn, layout, *args: run_ranks(fn, layout.tensor, layout, *args, timeout_s=240)
    of = lambda name: str(folder / name)
    found = {
        "fp8": ranks(save, one, FP8, of("fp8")),
        "fp8 to fp8": ranks(load, one, FP8, of("fp8")),
        "fp8 to tp2": ranks(load, two, FP8, of("fp8"), of("tp2")),
        "fp8 to tp2 to tp1": ranks(load, one, FP8, of("tp2")),
        "fp8 to bf16": ranks(load, plain, None, of("fp8"), of("bf16")),
        "fp8 to bf16 to fp8": ranks(load, one, FP8, of("bf16")),
        "bf16": ranks(save, plain, None, of("plain")),
        "bf16 to fp8": ranks(load, one, FP8, of("plain"), of("back")),
        "bf16 to fp8 to bf16": ranks(load, plain, None, of("back")),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
