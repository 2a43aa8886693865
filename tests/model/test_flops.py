"""FLOPs against the published sizes of Phi-4-mini and against torch's own counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phimini.model import reference
from phimini.model.config import (
    attention_flops,
    forward_flops,
    head_flops_per_token,
    layer_flops_per_token,
    preset,
    training_flops,
)
from phimini.model.reference import Phi4Mini


def test_phi4_mini_per_token() -> None:
    config = preset("phi-4-mini")
    linear = layer_flops_per_token(config) + head_flops_per_token(config)
    norms = config.model_dim * (2 * config.num_layers + 1)
    assert linear == 2 * (config.num_parameters - norms)
    assert linear / 1e9 == pytest.approx(7.67, abs=0.005)
    assert attention_flops(config, [0, 16384]) / 16384 / 1e9 == pytest.approx(3.22, abs=0.005)
    # 150e9 tokens in 2 days on 128 GPUs at 16K: about 222 TFLOP/s each.
    per_token = training_flops(config, [0, 16384]) / 16384
    assert per_token / 1e9 == pytest.approx(32.7, abs=0.05)
    assert per_token * 150e9 / (128 * 172_800) / 1e12 == pytest.approx(222, abs=1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_equals_torchs_counter(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reference, "linear", torch.nn.functional.linear
    )  # torch counts only its own
    config = dataclasses.replace(preset("tiny"), num_layers=2)
    model = Phi4Mini(config)
    T = 24
    with FlopCounterMode(display=False) as counter:
        logits = model.logits(model(torch.randint(0, config.vocab_size, (1, T))))
        if backward:
            logits.sum().backward()
    # torch counts neither CPU attention; matrix products it counts as we do.
    counted = counter.get_total_flops() - counter.get_flop_counts()["Global"].get(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, 0
    )
    matmuls = T * (layer_flops_per_token(config) + head_flops_per_token(config))
    assert counted == (3 if backward else 1) * matmuls


def test_documents_do_not_attend_to_each_other() -> None:
    config = preset("tiny")
    assert attention_flops(config, [0, 5, 12]) == attention_flops(config, [0, 5]) + attention_flops(
        config, [0, 7]
    )
    assert attention_flops(config, [0, 12]) > attention_flops(config, [0, 5, 12])
    # One token sees one key: two products of H * K multiply-adds in each layer.
    assert attention_flops(config, torch.tensor([0, 1])) == 4 * 4 * 128


def test_rows_without_loss_save_the_head() -> None:
    config = preset("tiny")
    saved = forward_flops(config, [0, 10]) - forward_flops(config, [0, 10], num_head_tokens=4)
    assert saved == 6 * head_flops_per_token(config)
    assert training_flops(config, [0, 10], 4) == 3 * forward_flops(config, [0, 10], 4)


@pytest.mark.parametrize(
    "cuts", [[0], [1, 5], [0, 5, 3]], ids=["no document", "not from 0", "falling"]
)
def test_bad_cuts(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens rising from 0"):
        attention_flops(preset("tiny"), cuts)
