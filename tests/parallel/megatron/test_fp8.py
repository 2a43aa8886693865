"""FP8 linears: torch's rounding, the recipe's scales, equal results at any layout, and the choice of the recipe."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked_ranks import run_ranks
from fp8_cases import CONFIG
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from phimini.model.config import ModelConfig, preset
from phimini.parallel.megatron import fp8_emulated
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.fp8 import ALIGNMENT, Fp8, check_alignment, choose, te_config_values
from phimini.parallel.megatron.fp8_emulated import (
    E4M3,
    E5M2,
    Fp8Recipe,
    cast,
    fp8_linear,
    round_activation,
    round_blocks,
    round_weight,
)
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import Document, pack
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.training.step import forward_backward

RECIPES: tuple[Fp8Recipe, ...] = ("tensorwise", "blockwise", "mxfp8")
CPU = torch.device("cpu")


# --- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_a_cast_is_torchs_and_clamps(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.randn(1000) * largest / 8
    assert cast(x, dtype).equal(x.clamp(-largest, largest).to(dtype).float())
    far = torch.tensor([2.0, -2.0, 1e30]) * largest
    assert cast(far, dtype).tolist() == [largest, -largest, largest]
    if dtype is E5M2:  # the negative control: without the clamp what is too large is lost
        assert not far.to(dtype).float().isfinite().any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_rounding_is_within_half_a_step_of_the_format(
    recipe: Fp8Recipe, dtype: torch.dtype
) -> None:
    x = torch.randn(64, 320) * torch.logspace(-3, 3, 320)
    got = round_activation(x, dtype, recipe, None)
    half_step = 2.0 ** -(4 if dtype is E4M3 else 3)
    subnormal = x.abs().amax(1, keepdim=True) if recipe != "tensorwise" else x.abs().amax()
    floor = subnormal * (2.0**-10 / 448 if dtype is E4M3 else 2.0**-17 / 57344) * 2
    assert ((got - x).abs() <= half_step * x.abs() + floor).all()
    assert not got.equal(x)


def test_each_block_has_its_own_scale() -> None:
    """Scaling one block by a power of two scales its values and leaves every other block as it was."""
    x = torch.randn(256, 256)
    y = x.clone()
    y[128:, :128] *= 2.0**20
    a, b = round_blocks(x, E4M3, 128, 128), round_blocks(y, E4M3, 128, 128)
    assert b[128:, :128].equal(a[128:, :128] * 2.0**20)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[128:, :128] = False
    assert b[mask].equal(a[mask])
    # One scale for all would flush the small blocks to a few values.
    assert not torch.allclose(
        round_activation(y, E4M3, "tensorwise", None)[mask], a[mask], rtol=0.1
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (128, 128), (1, 32)])
def test_blocks_at_the_ends_may_be_smaller(rows: int, columns: int) -> None:
    x = torch.randn(150, 141)
    got = round_blocks(x, E4M3, rows, columns)
    assert got.shape == x.shape
    last = x[-(150 % rows or rows) :, -(141 % columns or columns) :]
    largest = last.abs().amax(1, keepdim=True) if rows == 1 else last.abs().amax()
    scale = 2.0 ** torch.ceil(torch.log2(largest / 448))
    want = cast(last / scale, E4M3) * scale
    assert got[-last.shape[0] :, -last.shape[1] :].equal(want)


@pytest.mark.parametrize(("recipe", "columns"), [("blockwise", 128), ("mxfp8", 32)])
def test_block_scales_are_powers_of_two_and_zeros_stay(recipe: Fp8Recipe, columns: int) -> None:
    x = torch.randn(4, 256)
    x[1] = 0
    got = round_activation(x, E4M3, recipe, None)
    assert got[1].equal(torch.zeros(256))
    for row in (0, 2, 3):
        block = x[row, :columns]
        scale = 2.0 ** torch.ceil(torch.log2(block.abs().amax() / 448))
        assert got[row, :columns].equal(cast(block / scale, E4M3) * scale)
    # A power of two moves no value to another step of the format: twice is once.
    assert round_activation(got, E4M3, recipe, None).equal(got)


# --- the linear ----------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_gradients_are_the_formulas(recipe: Fp8Recipe) -> None:
    # Heavy tails: with values of one size a scale that is a power of two does not matter.
    x = (torch.randn(3, 50, 192) * (2 * torch.randn(3, 50, 192)).exp()).requires_grad_()
    w = torch.randn(96, 192, requires_grad=True)
    dy = torch.randn(3, 50, 96) * (2 * torch.randn(3, 50, 96)).exp() * 1e-3
    y = fp8_linear(x, w, recipe)
    y.backward(dy)
    x2, dy2 = x.detach().view(-1, 192), dy.view(-1, 96)
    activation = lambda v, dtype: round_activation(v, dtype, recipe, None)
    want = activation(x2, E4M3) @ round_weight(w.detach(), recipe, None).T
    dtype = E5M2 if recipe == "tensorwise" else E4M3
    dx = activation(dy2, dtype) @ round_weight(w.detach().T, recipe, None).T
    dw = activation(dy2.T, dtype) @ activation(x2.T, E4M3).T
    assert x.grad is not None and w.grad is not None
    for got, formula in ((y.detach().view(-1, 96), want), (x.grad.view(-1, 192), dx), (w.grad, dw)):
        assert ((got - formula).norm() / formula.norm()).item() < 1e-6
    exact = x2 @ w.detach().T
    relative = ((want - exact).norm() / exact.norm()).item()
    assert 0.005 < relative < 0.06, "rounded to 3 bits of mantissa: a few per cent, and not nothing"


BREAKS: dict[str, Any] = {
    "formats swapped": lambda m: m.setattr(fp8_emulated, "E4M3", E5M2) or m.setattr(fp8_emulated, "E5M2", E4M3),
    "a scale applied twice": lambda m: m.setattr(
        fp8_emulated, "cast", lambda x, dtype: cast(x, dtype) / x.abs().amax()
    ),
    "no rounding": lambda m: m.setattr(fp8_emulated, "cast", lambda x, dtype: x),
    "blocks along the wrong axis": lambda m: m.setattr(
        fp8_emulated, "round_activation",
        lambda x, dtype, recipe, group: round_activation(x.T, dtype, recipe, group).T,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_breaking_it_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[what](monkeypatch)
    with pytest.raises(AssertionError):
        test_forward_and_gradients_are_the_formulas("blockwise")


def head(
    hidden_MD: Tensor, weight_VD: Tensor, batch: Any, *, group: Any
) -> tuple[Tensor, Tensor, dict]:
    loss = hidden_MD.square().sum() * 1e-2
    return loss, torch.tensor(float(batch.num_tokens)), {}


def step(layout: Layout, fp8: Fp8 | None) -> tuple[float, dict[str, Tensor]]:
    world = initialize(layout, CONFIG)
    model = build_model(CONFIG, world, seed=3, fp8=fp8)
    model.zero_grad()
    tokens = torch.randint(1, 128, (96,), generator=torch.Generator().manual_seed(1)).tolist()
    batch = pack([Document(tokens=tokens[:40], targets=tokens[1:41]), Document(tokens=tokens[40:95], targets=tokens[41:96])])  # fmt: skip
    metrics = forward_backward(model, [batch], head)
    names = {
        type(m).__name__ for g in model.gpts for m in g.modules() if "Linear" in type(m).__name__
    }
    grads = {n: p.main_grad.clone() for n, p in model.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
    return metrics.loss, {k: v for k, v in grads.items()} | {n: torch.zeros(0) for n in names}


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_middle_layers_are_rounded(recipe: Fp8Recipe) -> None:
    loss, grads = run_ranks(step, 1, Layout(), Fp8(recipe=recipe, emulate=True))[0]
    exact, _ = run_ranks(step, 1, Layout(), None)[0]
    assert loss != exact and loss == pytest.approx(exact, rel=0.01)
    assert f"Fp8ColumnParallelLinear_{recipe}" in grads and "ColumnParallelLinear" in grads


def losses(fp8: Fp8 | None) -> list[float]:
    """Return the losses of 30 AdamW steps on one pack of counting sequences, in fp32 except for the linears."""
    world = initialize(Layout(), CONFIG)
    model = build_model(CONFIG, world, seed=3, fp8=fp8)
    optimizer = build_optimizer(model, OptimizerConfig(lr=2e-3, warmup_steps=3, total_steps=30))
    starts = torch.randint(0, 90, (8,), generator=torch.Generator().manual_seed(2)).tolist()
    batch = pack(
        [Document(tokens=[*range(a, a + 24)], targets=[*range(a + 1, a + 25)]) for a in starts]
    )

    def cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, batch: Any, *, group: Any) -> Any:
        loss = F.cross_entropy(hidden_MD @ weight_VD.T, batch.targets_T, reduction="sum")
        return loss, torch.tensor(float(batch.num_tokens)), {}

    found = []
    for _ in range(30):
        optimizer.zero_grad()
        found.append(forward_backward(model, [batch], cross_entropy).loss)
        optimizer.step()
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_in_fp8_stays_within_one_percent(recipe: Fp8Recipe) -> None:
    (exact,) = run_ranks(losses, 1, None)
    (got,) = run_ranks(losses, 1, Fp8(recipe=recipe, emulate=True))
    assert exact[-1] < 0.5 * exact[0], "it learns"
    assert got != exact
    assert sum(got) == pytest.approx(sum(exact), rel=0.01)


def modules(layout: Layout) -> list[str]:
    world = initialize(layout, CONFIG)
    model = build_model(CONFIG, world, fp8=Fp8(recipe="blockwise", emulate=True))
    linears = [
        (n, m) for gpt in model.gpts for n, m in gpt.named_modules() if n.endswith("mlp.linear_fc1")
    ]
    return [type(module).__name__ for _, module in linears]


def test_the_first_and_last_layer_of_the_whole_model_are_spared_on_every_stage() -> None:
    plain, fp8 = "ColumnParallelLinear", "Fp8ColumnParallelLinear_blockwise"
    stages = run_ranks(modules, 2, Layout(pipeline=2))
    assert [name for stage in stages for name in stage] == [plain, fp8, fp8, plain]


def parts(size: int, recipe: Fp8Recipe, sequence_parallel: bool) -> list[tuple[Tensor, ...]]:
    """Gather the results of a column-parallel and a row-parallel product of this rank's shards with whole inputs."""
    group: Any = dist.group.WORLD if size > 1 else None
    rank = dist.get_rank() if size > 1 else 0
    g = torch.Generator().manual_seed(5)
    x, w, v = (torch.randn(n, generator=g) for n in ((64, 256), (512, 256), (256, 512)))
    dy = torch.randn(64, 256, generator=g) * 1e-3
    x.requires_grad_()
    mine = [
        w.chunk(size, 0)[rank].clone().requires_grad_(),
        v.chunk(size, 1)[rank].clone().requires_grad_(),
    ]
    y = fp8_linear(fp8_linear(x, mine[0], recipe, group), mine[1], recipe, group)
    y.backward(dy)
    return [(y.detach(), x.grad, mine[0].grad, mine[1].grad)]  # pyright: ignore[reportReturnType]


def ranks_parts(recipe: Fp8Recipe) -> list[tuple[Tensor, ...]]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return parts(dist.get_world_size(), recipe, False)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_two_ranks_round_as_one(recipe: Fp8Recipe) -> None:
    """Two ranks sum the intermediate activation in another order, so single values may round to the next FP8 step."""
    ((y, dx, dw, dv),) = parts(1, recipe, False)
    pieces = [p[0] for p in run_ranks(ranks_parts, 2, recipe)]
    whole = (
        sum(p[0] for p in pieces), sum(p[1] for p in pieces), torch.cat([p[2] for p in pieces]),
        torch.cat([p[3] for p in pieces], 1),
    )  # fmt: skip
    for got, want in zip(whole, (y, dx, dw, dv), strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-5


def test_without_a_shared_scale_two_ranks_differ() -> None:
    """Negative control of the test above: each rank scales by its largest value."""
    v = torch.randn(256, 512)
    v[:, :256] *= 7
    whole = round_weight(v, "tensorwise", None)
    alone = torch.cat([round_weight(half, "tensorwise", None) for half in v.chunk(2, 1)], 1)
    assert ((whole - alone).norm() / whole.norm()).item() > 1e-3


def test_tensor_and_sequence_parallel_models_agree_with_one_rank() -> None:
    fp8 = Fp8(recipe="tensorwise", emulate=True)
    loss, _ = run_ranks(step, 1, Layout(), fp8)[0]
    for layout in (Layout(tensor=2), Layout(tensor=2, sequence_parallel=True)):
        got, _ = run_ranks(step, 2, layout, fp8)[0]
        assert got == pytest.approx(loss, rel=1e-4)


# --- choices -------------------------------------------------------------------------------------
def test_recipes_by_gpu() -> None:
    cuda = torch.device("cuda")
    assert choose("none", "auto", CPU) is None
    assert choose("emulate", "auto", CPU) == Fp8(recipe="tensorwise", emulate=True)
    assert choose("te", "auto", cuda, (9, 0)) == Fp8(recipe="tensorwise", emulate=False)
    assert choose("te", "blockwise", cuda, (9, 0)) == Fp8(recipe="blockwise", emulate=False)
    assert choose("te", "auto", cuda, (10, 0)) == Fp8(recipe="mxfp8", emulate=False)
    assert choose("te", "tensorwise", cuda, (8, 9)) == Fp8(recipe="tensorwise", emulate=False)
    with pytest.raises(ValueError, match="compute capability 8.0 has no FP8 recipe"):
        choose("te", "auto", cuda, (8, 0))
    with pytest.raises(ValueError, match="fp8_recipe=mxfp8: .* 9.0 can do tensorwise, blockwise"):
        choose("te", "mxfp8", cuda, (9, 0))
    with pytest.raises(
        ValueError, match="Transformer Engine needs a GPU; on a CPU use fp8=emulate"
    ):
        choose("te", "auto", CPU)


def test_alignment_after_the_split() -> None:
    phi = preset("phi-4-mini")
    for recipe in RECIPES:
        for tensor in (1, 2, 4, 8):
            check_alignment(phi, Layout(tensor=tensor), Fp8(recipe=recipe, emulate=False))
    with pytest.raises(ValueError, match=r"mlp_dim = 256 over tensor 4 is 64 per rank, not a multiple of 128; tensor in \[1, 2\]"):  # fmt: skip
        check_alignment(
            ModelConfig(num_layers=4, model_dim=128, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=256,
                        vocab_size=128, max_positions=64, original_max_positions=64),
            Layout(tensor=4), Fp8(recipe="blockwise", emulate=False),
        )  # fmt: skip
    check_alignment(CONFIG, Layout(tensor=2), Fp8(recipe="blockwise", emulate=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_are_padded_to_what_the_product_takes(recipe: Fp8Recipe) -> None:
    fp8 = Fp8(recipe=recipe, emulate=False)
    assert fp8.token_alignment == ALIGNMENT[recipe]
    layout = Layout(
        tensor=2, context=2, sequence_parallel=True, token_alignment=fp8.token_alignment
    )
    # Transformer Engine looks at a rank's own shard, after the context's split and the sequence's.
    assert layout.token_multiple // layout.context // layout.tensor % ALIGNMENT[recipe] == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_kept_in_fp8_only_where_megatron_keeps_their_masters(recipe: Fp8Recipe) -> None:
    fp8 = Fp8(recipe=recipe, emulate=False)
    plain, zero = (te_config_values(fp8, distributed_optimizer=z) for z in (False, True))
    assert plain["fp8_recipe"] == zero["fp8_recipe"] == recipe
    assert zero["fp8"] == ("hybrid" if recipe == "tensorwise" else "e4m3")
    assert not plain["fp8_param"] and zero["fp8_param"] == (recipe != "mxfp8")
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert zero.keys() <= fields, "a field that this megatron-core does not have would be dropped"


def test_the_master_of_an_fp8_weight_is_what_was_loaded() -> None:
    """Transformer Engine keeps the values that a weight was built with, from which Megatron would make the master."""
    from phimini.parallel.megatron.hf_weights import from_hf, to_hf

    def build() -> bool:
        world = initialize(Layout(), CONFIG)
        model = build_model(CONFIG, world, seed=3, trainable=False)
        tensors = dict(to_hf(model))
        parameters = dict(model.named_parameters())
        name = next(n for n in parameters if n.endswith("linear_fc2.weight"))
        parameters[name]._high_precision_init_val = torch.full_like(parameters[name], 7.0)  # pyright: ignore
        from_hf(model, tensors)
        return parameters[name]._high_precision_init_val.equal(parameters[name].float())  # pyright: ignore

    assert run_ranks(build, 1)[0]
