"""The sampler's folded decode step against the reference model's forward."""

import dataclasses

import pytest
import torch
from model_cases import LIMIT, SMALL, build, relative

from phimini.model.config import ModelConfig
from phimini.model.decode_step import Decoder
from phimini.model.reference import KVCache

SHAPES = {
    "long table": SMALL,
    "short table": dataclasses.replace(SMALL, rope_factors="short"),
    "whole head rotated, plain": dataclasses.replace(
        SMALL, partial_rotary_factor=1.0, short_factor=None, long_factor=None
    ),
    "untied, one group": dataclasses.replace(SMALL, tie_embeddings=False, num_kv_heads=1),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_steps_equal_the_forward(config: ModelConfig) -> None:
    """Rows of mixed lengths, admitted from one prefill into slots 2 to 4, then decoded for a while."""
    model = build(config)
    lengths, num_steps = [3, 17, 9], 12
    rows = [torch.randint(0, config.vocab_size, (n + num_steps,)) for n in lengths]
    padded_BT = torch.zeros(3, 17, dtype=torch.long)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        padded_BT[b, :n] = row[:n]
    cache = KVCache(config, 3, 17)
    model(padded_BT, cache=cache)
    decoder = Decoder(model, 6, 17 + num_steps)
    decoder.admit(2, cache, torch.arange(3))
    for i in range(num_steps):
        tokens_B = torch.stack([row[n + i] for row, n in zip(rows, lengths, strict=True)])
        hidden_BD = decoder.step(tokens_B, torch.tensor(lengths) + i, 2, max(lengths) + i + 1)
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            want = model(row[None, : n + i + 1])[0, -1]
            assert relative(hidden_BD[b], want) <= LIMIT, f"row {b}, step {i}"


@torch.no_grad()
def test_a_moved_slot_goes_on_as_before() -> None:
    model = build()
    tokens_BT = torch.randint(0, SMALL.vocab_size, (3, 10))
    cache = KVCache(SMALL, 3, 8)
    model(tokens_BT[:, :8], cache=cache)
    decoder = Decoder(model, 3, 10)
    decoder.admit(0, cache, torch.tensor([2, 1, 0]))
    decoder.move(2, 0, 8)  # slots now hold rows 0, 1, 0
    hidden_BD = decoder.step(tokens_BT[[0, 1], 8], torch.tensor([8, 8]), 0, 9)
    want = model(tokens_BT[:, :9])[:2, -1]
    assert relative(hidden_BD, want) <= LIMIT
    # Negative control: without the move, slot 0 would still be row 2.
    decoder.admit(0, cache, torch.tensor([2, 1, 0]))
    stale = decoder.step(tokens_BT[[0, 1], 8], torch.tensor([8, 8]), 0, 9)
    assert relative(stale[0], want[0]) > 100 * LIMIT


@torch.no_grad()
def test_a_bf16_model_stays_bf16() -> None:
    model = build().to(torch.bfloat16)
    tokens_BT = torch.randint(0, SMALL.vocab_size, (2, 6))
    cache = KVCache(SMALL, 2, 5, dtype=torch.bfloat16)
    model(tokens_BT[:, :5], cache=cache)
    decoder = Decoder(model, 2, 6)
    decoder.admit(0, cache, torch.arange(2))
    hidden_BD = decoder.step(tokens_BT[:, 5], torch.tensor([5, 5]), 0, 6)
    assert hidden_BD.dtype == torch.bfloat16
    precise = build()(tokens_BT)[:, -1]
    ours = relative(hidden_BD.float(), precise)
    theirs = relative(model(tokens_BT)[:, -1].float(), precise)
    assert ours <= 2 * theirs + 2**-8
