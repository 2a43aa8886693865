"""Conversion between Megatron shards and Hugging Face tensors: the same numbers under two names."""

import ctypes
import dataclasses
import os
import resource
from pathlib import Path

import pytest
import torch
from forked_ranks import RankFailure, run_ranks
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from phimini.model.config import ModelConfig, preset
from phimini.model.io.huggingface import load_config, parameter_shapes, read_tensors
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import (
    export_hf,
    from_hf,
    gradients_to_hf,
    load_hf,
    slots,
    to_hf,
)
from phimini.parallel.megatron.weight_names import (
    LAYER_NAMES,
    Split,
    hf_names,
    merge_shards,
    take_shard,
)
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize

CONFIG = ModelConfig(
    num_layers=4, model_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=96, vocab_size=128,
    max_positions=64, original_max_positions=64,
)  # fmt: skip
LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "tp2-pp2": Layout(tensor=2, pipeline=2),
    "pp2-vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "tp4-sp": Layout(tensor=4, sequence_parallel=True),
    "cp2-dp2": Layout(context=2, data=2),
}


def world_size(layout: Layout) -> int:
    return layout.model_size * (layout.data or 1)


def hf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in hf_names(config).items()}


def built(config: ModelConfig, layout: Layout, **options) -> Model:
    return build_model(config, initialize(layout, config), seed=None, **options)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_are_those_of_the_reference_model(tied: bool) -> None:
    config = dataclasses.replace(preset("tiny"), tie_embeddings=tied)
    assert hf_names(config) == parameter_shapes(config)
    full = dataclasses.replace(preset("phi-4-mini"), tie_embeddings=tied)
    sizes = [torch.Size(shape).numel() for shape in hf_names(full).values()]
    assert sum(sizes) == full.num_parameters


def test_qkv_shard_is_whole_groups_of_q_k_v() -> None:
    """Numbered rows show the order itself, which a round trip would not."""
    G, H, K = CONFIG.num_kv_heads, CONFIG.num_heads, CONFIG.head_dim
    rows = torch.arange((H + 2 * G) * K)
    shard = take_shard(rows[:, None], "qkv", 1, 2, CONFIG).flatten()
    q, k, v = rows.split((H * K, G * K, G * K))
    expected = []
    for group in (2, 3):  # the second half of four
        expected += [q[group * 2 * K : (group + 1) * 2 * K], k[group * K : (group + 1) * K]]
        expected += [v[group * K : (group + 1) * K]]
    assert torch.equal(shard, torch.cat(expected))


def test_gate_up_shard_is_its_gate_then_its_up() -> None:
    F = CONFIG.mlp_dim
    shard = take_shard(torch.arange(2 * F)[:, None], "gate_up", 1, 4, CONFIG).flatten()
    assert shard.tolist() == [*range(F // 4, F // 2), *range(F + F // 4, F + F // 2)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("split", ["rows", "columns", "qkv", "gate_up"])
def test_merge_inverts_take(split: Split, size: int) -> None:
    name = {
        "rows": "model.embed_tokens.weight",
        "columns": "model.layers.0.mlp.down_proj.weight",
        "qkv": "model.layers.0.self_attn.qkv_proj.weight",
        "gate_up": "model.layers.0.mlp.gate_up_proj.weight",
    }[split]
    whole = torch.randn(hf_names(CONFIG)[name])
    shards = torch.stack([take_shard(whole, split, r, size, CONFIG) for r in range(size)])
    assert shards[0].numel() * size == whole.numel()
    assert torch.equal(merge_shards(shards, split, CONFIG), whole)


def test_transformer_engine_names_mean_the_same_tensors() -> None:
    """TE has a layer's norms inside the next linear; all other names are those of the local spec."""
    te = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    }
    local = {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
    assert {n: LAYER_NAMES[n][0] for n in te} == te
    with_te = {hf for megatron, (hf, _) in LAYER_NAMES.items() if megatron not in local}
    without = {hf for megatron, (hf, _) in LAYER_NAMES.items() if megatron not in te}
    assert with_te == without == {n.split(".", 3)[3] for n in hf_names(CONFIG) if "layers.0." in n}


def round_trip(config: ModelConfig, layout: Layout, every_rank: bool) -> int:
    """Fill the model, read it and its gradients back, and return the number of tensors on this rank."""
    model = built(config, layout)
    expected = hf_tensors(config)
    from_hf(model, expected)
    got = {name: t.clone() for name, t in to_hf(model, every_rank=every_rank)}
    for slot in slots(model):
        slot.parameter.main_grad.copy_(-2 * slot.parameter.detach())  # pyright: ignore[reportAttributeAccessIssue]
    gradients = {name: t.clone() for name, t in gradients_to_hf(model, every_rank=every_rank)}
    if every_rank or model.world.is_main:
        assert list(got) == list(gradients) == list(hf_names(config))
        for name, t in expected.items():
            assert torch.equal(got[name], t), name
            assert torch.equal(gradients[name], -2 * t), name
    return len(got)


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip_at_every_layout(name: str) -> None:
    layout = LAYOUTS[name]
    seen = run_ranks(round_trip, world_size(layout), CONFIG, layout, True)
    assert seen == [len(hf_names(CONFIG))] * world_size(layout)


@pytest.mark.parametrize("name", ["tp2-pp2", "pp2-vpp2", "cp2-dp2"])
def test_only_rank_0_sees_an_untied_model(name: str) -> None:
    layout, config = LAYOUTS[name], dataclasses.replace(CONFIG, tie_embeddings=False)
    seen = run_ranks(round_trip, world_size(layout), config, layout, False)
    assert seen == [len(hf_names(config))] + [0] * (world_size(layout) - 1)


def test_gradients_of_zero1_are_gathered() -> None:
    def run() -> None:
        layout = Layout(data=2)
        model = built(CONFIG, layout, distributed_optimizer=True)
        expected = hf_tensors(CONFIG)
        from_hf(model, expected)
        for slot in slots(model):  # what a backward pass leaves: a sum over the two ranks
            slot.parameter.main_grad.copy_(slot.parameter.detach())  # pyright: ignore[reportAttributeAccessIssue]
        for chunk in model.chunks:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.finish_grad_sync()
        for name, gradient in gradients_to_hf(model):
            assert torch.equal(gradient, 2 * expected[name]), name

    run_ranks(run, 2)


@pytest.mark.parametrize("as_mapping", [True, False], ids=["mapping", "pairs"])
def test_bad_tensors_are_named(as_mapping: bool) -> None:
    def run() -> list[str]:
        model = built(CONFIG, Layout())
        messages = []
        name = "model.layers.2.mlp.down_proj.weight"
        good = hf_tensors(CONFIG)
        for bad in (
            {k: v for k, v in good.items() if k != name},
            good | {name: good[name].T},
            good | {"model.layers.9.mlp.down_proj.weight": good[name]},
            good | {"lm_head.weight": torch.zeros_like(good["model.embed_tokens.weight"])},
        ):
            with pytest.raises(ValueError) as e:
                from_hf(model, bad if as_mapping else iter(bad.items()), source="somewhere")
            messages.append(str(e.value))
        from_hf(model, good | {"lm_head.weight": good["model.embed_tokens.weight"].clone()})
        return messages

    missing, shape, unknown, head = run_ranks(run, 1)[0]
    kind = "a 4-layer Phi3 model of width 64, tied embeddings"
    name = "model.layers.2.mlp.down_proj.weight"
    assert missing == f"somewhere: missing tensor '{name}' of {kind}"
    assert shape == f"somewhere: tensor '{name}' has shape (96, 64), expected (64, 96)"
    assert unknown == f"somewhere: unknown tensor 'model.layers.9.mlp.down_proj.weight' for {kind}"
    assert head.startswith("somewhere: tensor 'lm_head.weight' differs from")


def test_export_from_one_layout_loads_in_another(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def save() -> None:
        model = built(CONFIG, LAYOUTS["tp2-pp2"])
        from_hf(model, hf_tensors(CONFIG, seed=1))
        export_hf(model, folder)
        from_hf(model, hf_tensors(CONFIG))
        export_hf(model, folder, max_shard_bytes=100_000)  # replaces the first one

    def load() -> None:
        config = load_config(folder)
        model = built(config, LAYOUTS["pp2-vpp2"])
        load_hf(model, folder)
        for name, t in to_hf(model):
            assert torch.equal(t, expected[name]), name

    expected = hf_tensors(CONFIG)
    run_ranks(save, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    files = read_tensors(folder)
    assert len(set(files.file_of.values())) > 1, "this test wants several shards"
    assert all(torch.equal(files[n], t) for n, t in expected.items()) and len(files) == len(
        expected
    )
    run_ranks(load, 2)


@pytest.mark.parametrize("name", ["tp1", "tp2-pp2"])
def test_an_export_holds_one_file_s_tensors_at_a_time(name: str, tmp_path: Path) -> None:
    """Additional peak memory of rank 0 against the largest file."""
    wide = dataclasses.replace(CONFIG, num_layers=24, model_dim=512, mlp_dim=1024, vocab_size=8192)
    limit = 40_000_000  # of 170 MB; the embedding alone is 17 MB, a layer's largest matrix 4

    def run() -> int:
        # Tensors of the full-size model are large enough that glibc gives their memory back: these too.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
        model = built(wide, LAYOUTS[name], trainable=False)
        export_hf(model, tmp_path / "warm", max_shard_bytes=1_000_000)
        held = resident_bytes()
        reset_peak()
        export_hf(model, tmp_path / "model", max_shard_bytes=limit)
        return peak_bytes() - held

    grown = run_ranks(run, world_size(LAYOUTS[name]))[0]
    files = sorted((tmp_path / "model").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    assert len(files) >= 5
    largest = files[-1].stat().st_size
    assert 0.2 * largest < grown < 1.3 * largest, (grown / largest, largest)


M_MMAP_THRESHOLD = -3  # malloc.h


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l]
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def test_a_failed_export_is_raised_on_every_rank_and_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def run() -> str:
        model = built(CONFIG, LAYOUTS["tp2-pp2"])
        from_hf(model, hf_tensors(CONFIG))
        export_hf(model, folder)
        from_hf(model, hf_tensors(CONFIG, seed=1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as e:
            export_hf(model, folder)
        return str(e.value)

    messages = run_ranks(run, 4)
    assert len(set(messages)) == 1 and str(tmp_path) in messages[0]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    expected = hf_tensors(CONFIG)
    files = read_tensors(folder)
    assert all(torch.equal(files[name], t) for name, t in expected.items())


def test_load_names_file_and_tensor(tmp_path: Path) -> None:
    def run() -> None:
        model = built(CONFIG, Layout())
        from_hf(model, hf_tensors(CONFIG))
        export_hf(model, tmp_path / "model")
        other = dataclasses.replace(CONFIG, mlp_dim=128)
        model.world.close()
        load_hf(built(other, Layout()), tmp_path / "model")

    with pytest.raises(
        RankFailure, match=r"model\.safetensors: model\.layers\.0\.mlp\.\w+\.weight"
    ):
        run_ranks(run, 1)
