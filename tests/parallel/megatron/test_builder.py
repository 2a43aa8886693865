"""build_model: the reference's weights at any layout, the attributes that Megatron needs, frozen models."""

import dataclasses

import pytest
import torch
from forked_ranks import run_ranks
from parity_cases import config
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.reference import Phi4Mini
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize


def weights_rank(
    layout: Layout, model_config: ModelConfig, seed: int
) -> tuple[dict[str, Tensor], int]:
    world = initialize(layout, model_config, timeout_s=200)
    model = build_model(model_config, world, seed=seed)
    own = sum(p.numel() for _, p in model.named_parameters())
    whole = {name: w.clone() for name, w in to_hf(model)}
    world.close()
    return whole, own


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(), 1), (Layout(tensor=2, pipeline=2), 4), (Layout(pipeline=2, virtual_pipeline=2), 2)],
    ids=["single", "tp2-pp2", "pp2-vpp2"],
)
def test_every_layout_starts_from_the_reference_s_weights(
    layout: Layout, world_size: int, tied: bool
) -> None:
    model_config = config(tie_embeddings=tied)
    reference = Phi4Mini(model_config)
    reference.init_weights(3)
    results = run_ranks(weights_rank, world_size, layout, model_config, 3, timeout_s=200)
    for whole, own in results:
        assert whole.keys() == reference.state_dict().keys()
        for name, want in reference.state_dict().items():
            assert whole[name].equal(want), name
        if world_size == 4:
            assert own < 0.5 * model_config.num_parameters  # a rank holds its part and no more
    other, _ = run_ranks(weights_rank, 1, Layout(), model_config, 4, timeout_s=200)[0]
    assert not other["model.embed_tokens.weight"].equal(results[0][0]["model.embed_tokens.weight"])


def describe_rank(layout: Layout, options: dict) -> dict:
    model_config = config()
    world = initialize(layout, model_config, timeout_s=200)
    model = build_model(model_config, world, **options)
    parameters = dict(model.named_parameters())
    found = dict(
        dtypes={p.dtype for p in parameters.values()},
        trainable={p.requires_grad for p in parameters.values()},
        with_gradient_buffer={hasattr(p, "main_grad") for p in parameters.values()},
        sequence_parallel={n.split(".")[-2] for n, p in parameters.items() if getattr(p, "sequence_parallel", False)},
        split={n.split(".")[-2] for n, p in parameters.items() if getattr(p, "tensor_model_parallel", False)},
        overlap_p2p=model.transformer_config.overlap_p2p_comm,
        batch_p2p=model.transformer_config.batch_p2p_comm,
        count=sum(p.numel() for p in parameters.values()),
    )  # fmt: skip
    world.close()
    return found


def test_a_trainable_model_of_one() -> None:
    (found,) = run_ranks(describe_rank, 1, Layout(), {}, timeout_s=200)
    assert found["dtypes"] == {torch.float32}
    assert found["trainable"] == {True} and found["with_gradient_buffer"] == {True}
    assert found["sequence_parallel"] == set()
    assert found["count"] == config().num_parameters


def test_a_frozen_model_has_no_gradient_buffers() -> None:
    (found,) = run_ranks(describe_rank, 1, Layout(), dict(trainable=False), timeout_s=200)
    assert found["trainable"] == {False} and found["with_gradient_buffer"] == {False}


def test_bf16_parameters() -> None:
    (found,) = run_ranks(describe_rank, 1, Layout(), dict(dtype=torch.bfloat16), timeout_s=200)
    assert found["dtypes"] == {torch.bfloat16}


def test_sequence_parallel_marks_every_norm_and_nothing_else() -> None:
    found = run_ranks(describe_rank, 2, Layout(tensor=2, sequence_parallel=True), {}, timeout_s=200)
    for rank in found:
        assert rank["sequence_parallel"] == {
            "input_layernorm",
            "pre_mlp_layernorm",
            "final_layernorm",
        }
        # What Megatron counts once over tensor-parallel ranks in the gradient norm.
        assert rank["split"] == {
            "word_embeddings", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2",
        }  # fmt: skip


def test_two_interleaved_stages_never_batch_their_sends() -> None:
    found = run_ranks(describe_rank, 2, Layout(pipeline=2, virtual_pipeline=2), {}, timeout_s=200)
    assert all(rank["overlap_p2p"] and not rank["batch_p2p"] for rank in found)
    found = run_ranks(describe_rank, 2, Layout(pipeline=2), {}, timeout_s=200)
    assert all(rank["batch_p2p"] for rank in found)


def test_one_world_at_a_time() -> None:
    def twice() -> str:
        initialize(Layout(), config())
        with pytest.raises(RuntimeError, match="already has a World"):
            initialize(Layout(), config())
        return "refused"

    assert run_ranks(twice, 1, timeout_s=200) == ["refused"]


def test_a_closed_world_can_be_followed_by_another() -> None:
    def again() -> list[int]:
        counts = []
        for layers in (2, 4):
            model_config = dataclasses.replace(config(), num_layers=layers)
            world = initialize(Layout(), model_config)
            model = build_model(model_config, world)
            counts.append(sum(p.numel() for _, p in model.named_parameters()))
            world.close()
        return counts

    (counts,) = run_ranks(again, 1, timeout_s=200)
    assert counts == [dataclasses.replace(config(), num_layers=n).num_parameters for n in (2, 4)]
