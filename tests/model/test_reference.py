"""The reference model against Hugging Face's Phi3ForCausalLM, and against itself: packed, padded, cached.

B batch, T tokens, D model width, V vocabulary. Matrices are initialised 4 times wider than usual: with near-zero scores
no error in attention would show.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from model_cases import LIMIT, SMALL, build, hf_config, relative
from torch import Tensor
from torch.utils._device import _device_constructors
from transformers import Phi3ForCausalLM

from phimini.model.config import ModelConfig, preset
from phimini.model.reference import KVCache, Phi4Mini, RMSNorm

# torch.device("meta") remembers torch's constructors at its first use; conftest replaces torch.empty in each test, and
# a first use inside a test would then build 15 GB of real weights.
_device_constructors()


def build_hf(model: Phi4Mini) -> Phi3ForCausalLM:
    config = hf_config(model.config)
    config.update(
        {
            "vocab_size": model.config.vocab_size,
            "intermediate_size": model.config.mlp_dim,
            "num_hidden_layers": model.config.num_layers,
            "num_key_value_heads": model.config.num_kv_heads,
            "rms_norm_eps": model.config.norm_eps,
            "tie_word_embeddings": model.config.tie_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    )
    hf = Phi3ForCausalLM(config)
    state = model.state_dict()
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    hf.load_state_dict(state)
    return hf


def loss_of(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum"
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst_gradient(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    assert got.keys() == want.keys()
    return max((relative(got[name], want[name]), name) for name in want)


# HF takes the short table up to 128 tokens and the long one beyond; the run's table is forced to agree.
@pytest.mark.parametrize(
    ("factors", "T"),
    [("short", 60), ("short", 127), ("short", 128), ("long", 129), ("long", 200)],
    ids=["short 60", "short 127", "short 128, on the boundary", "long 129, above it", "long 200"],
)
def test_logits_and_gradients_equal_hugging_faces(factors: str, T: int) -> None:
    model = build(dataclasses.replace(SMALL, rope_factors=factors))
    hf = build_hf(model)
    tokens_BT = torch.randint(0, SMALL.vocab_size, (2, T))
    ours, theirs = model.logits(model(tokens_BT)), hf(tokens_BT).logits
    assert relative(ours, theirs) <= LIMIT
    loss_of(ours, tokens_BT).backward()
    loss_of(theirs, tokens_BT).backward()
    error, name = worst_gradient(gradients(model), gradients(hf))
    assert error <= LIMIT, f"gradient of {name}: {error:.2e} of its largest"


@pytest.mark.parametrize("T", [40, 128, 129])
def test_one_table_at_every_length(T: int) -> None:
    """The run's long table also below the boundary; HF agrees if both of its tables are the long one."""
    model = build()
    frozen = dataclasses.replace(SMALL, short_factor=SMALL.long_factor)
    hf = build_hf(model.__class__(frozen))
    hf.load_state_dict(model.state_dict(), strict=False)
    tokens_BT = torch.randint(0, SMALL.vocab_size, (1, T))
    assert relative(model.logits(model(tokens_BT)), hf(tokens_BT).logits) <= LIMIT


def test_untied_head_equals_hugging_faces() -> None:
    model = build(dataclasses.replace(SMALL, tie_embeddings=False, rope_factors="short"))
    tokens_BT = torch.randint(0, SMALL.vocab_size, (1, 20))
    assert "lm_head.weight" in model.state_dict()
    assert relative(model.logits(model(tokens_BT)), build_hf(model)(tokens_BT).logits) <= LIMIT


def test_phi4_mini_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Phi4Mini(preset("phi-4-mini"))
    assert sum(p.numel() for p in model.parameters()) == 3_836_021_760
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(shapes) == 32 * 6 + 2
    assert shapes["model.layers.31.self_attn.qkv_proj.weight"] == (5120, 3072)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (16384, 3072)


def test_breaking_the_rope_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_BT = torch.randint(0, SMALL.vocab_size, (1, 100))
    model = build(dataclasses.replace(SMALL, rope_factors="short"))
    want = build_hf(model)(tokens_BT).logits
    assert relative(model.logits(model(tokens_BT)), want) <= LIMIT
    flipped = Phi4Mini(SMALL)  # the long table
    flipped.load_state_dict(model.state_dict())
    assert relative(flipped.logits(flipped(tokens_BT)), want) > 100 * LIMIT
    monkeypatch.setattr(ModelConfig, "attention_factor", 1.0)
    assert relative(model.logits(model(tokens_BT)), want) > 100 * LIMIT


CUTS = [0, 9, 10, 33, 57]


def test_packed_documents_equal_separate_ones() -> None:
    tokens_BT = torch.randint(0, SMALL.vocab_size, (1, CUTS[-1]))
    documents = [tokens_BT[:, a:b] for a, b in zip(CUTS[:-1], CUTS[1:], strict=True)]
    alone, packed = build(), build()
    want = torch.cat([alone.logits(alone(d)) for d in documents], dim=1)
    got = packed.logits(packed(tokens_BT, cu_seqlens=torch.tensor(CUTS)))
    assert relative(got, want) <= LIMIT
    weights = torch.randn_like(want)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    error, name = worst_gradient(gradients(packed), gradients(alone))
    assert error <= LIMIT, f"gradient of {name}: {error:.2e}"
    # Negative controls: a boundary dropped (with and without its restart of positions).
    leaking = [c for c in CUTS if c != 10]
    restarts = torch.cat([torch.arange(b - a) for a, b in zip(CUTS[:-1], CUTS[1:], strict=True)])
    for positions in (None, restarts):
        leaked = packed.logits(packed(tokens_BT, cu_seqlens=leaking, positions=positions))
        assert relative(leaked, want) > 100 * LIMIT
        assert relative(leaked[:, :10], want[:, :10]) <= LIMIT


def test_right_padded_rows_equal_rows_alone() -> None:
    lengths = [5, 23, 1, 14]
    rows = [torch.randint(0, SMALL.vocab_size, (1, n)) for n in lengths]
    padded_BT = torch.cat([F.pad(r, (0, max(lengths) - r.shape[1])) for r in rows])
    real_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    alone, batched = build(), build()
    want = torch.cat([alone.logits(alone(r))[0] for r in rows])
    logits_BTV = batched.logits(batched(padded_BT))
    assert relative(logits_BTV[real_BT], want) <= LIMIT
    weights = torch.randn_like(want)
    (want * weights).sum().backward()
    (logits_BTV[real_BT] * weights).sum().backward(retain_graph=True)
    error, name = worst_gradient(gradients(batched), gradients(alone))
    assert error <= LIMIT, f"gradient of {name}: {error:.2e}"
    # Negative control: loss on the padding as well.
    batched.zero_grad()
    spread = torch.ones_like(logits_BTV)
    spread[real_BT] = weights
    (logits_BTV * spread).sum().backward()
    assert worst_gradient(gradients(batched), gradients(alone))[0] > 100 * LIMIT


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward() -> None:
    model = build()
    tokens_BT = torch.randint(0, SMALL.vocab_size, (2, 150))
    want = model(tokens_BT)
    cache = KVCache(SMALL, 2, 150)
    parts, at = [], 0
    for n in [60, 1, 30, 1, 1, 57]:
        parts.append(model(tokens_BT[:, at : at + n], cache=cache))
        at += n
    assert relative(torch.cat(parts, dim=1), want) <= LIMIT


@torch.no_grad()
def test_cached_rows_of_mixed_lengths_equal_rows_alone() -> None:
    model = build()
    lengths = [4, 19, 1]
    rows = [torch.randint(0, SMALL.vocab_size, (n + 6,)) for n in lengths]
    padded_BT = torch.stack([F.pad(r[:n], (0, 19 - n)) for r, n in zip(rows, lengths, strict=True)])

    def decode(unmask_padding: bool) -> list[float]:
        cache = KVCache(SMALL, 3, 40)
        model(padded_BT, cache=cache)
        if not unmask_padding:
            cache.set_lengths(lengths)
        last_BD = torch.stack(
            [
                model(
                    torch.stack([r[n + i] for r, n in zip(rows, lengths, strict=True)])[:, None],
                    cache=cache,
                )[:, 0]
                for i in range(6)
            ]
        )[-1]
        return [relative(last_BD[b], model(rows[b][None])[0, -1]) for b in range(3)]

    assert max(decode(unmask_padding=False)) <= LIMIT
    broken = decode(unmask_padding=True)
    assert min(broken[0], broken[2]) > 100 * LIMIT


def test_init_is_a_function_of_the_seed() -> None:
    a, b, c = Phi4Mini(SMALL), Phi4Mini(SMALL), Phi4Mini(SMALL)
    a.init_weights(3)
    torch.randn(5)  # the global generator plays no part
    b.init_weights(3)
    c.init_weights(4)
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name)), name
        assert p.ndim == 1 or not torch.equal(p, c.get_parameter(name)), name
    layer = "model.layers.0.self_attn."
    assert a.get_parameter(layer + "qkv_proj.weight").std().item() == pytest.approx(0.02, rel=0.05)
    # 1 / sqrt(2 * 2 layers)
    assert a.get_parameter(layer + "o_proj.weight").std().item() == pytest.approx(0.01, rel=0.05)


def test_norm_is_computed_in_fp32() -> None:
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16) * 300
    want = (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    assert torch.equal(norm(x), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": [0, 4]}, "rising from 0 to T = 8, got B = 1 and"),
        ({"cu_seqlens": [0, 4, 4, 8]}, "rising from 0"),
        ({"cu_seqlens": [2, 8]}, "rising from 0"),
        ({"cu_seqlens": [0, 8], "cache": KVCache(SMALL, 1, 8)}, "cu_seqlens or cache, got both"),
        ({"cache": KVCache(SMALL, 1, 7)}, "at most capacity = 7 tokens, got 8"),
    ],
    ids=["too short", "an empty document", "not from 0", "both", "cache too small"],
)
def test_wrong_calls_say_what_is_wrong(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phi4Mini(SMALL)(torch.zeros(1, 8, dtype=torch.long), **arguments)


def test_the_position_limit_is_each_documents() -> None:
    model = Phi4Mini(SMALL)
    tokens_BT = torch.zeros(1, 700, dtype=torch.long)
    assert model(tokens_BT, cu_seqlens=[0, 300, 700]).shape == (1, 700, 128)
    with pytest.raises(ValueError, match="at most max_positions = 512 tokens, got 513"):
        model(tokens_BT, cu_seqlens=[0, 513, 700])


def test_wrong_batch_and_length() -> None:
    model = Phi4Mini(SMALL)
    with pytest.raises(ValueError, match="B = 2"):
        model(torch.zeros(2, 8, dtype=torch.long), cu_seqlens=[0, 8])
    with pytest.raises(ValueError, match="at most max_positions = 512 tokens, got 513"):
        model(torch.zeros(1, 513, dtype=torch.long))
