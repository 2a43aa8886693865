"""Hugging Face folders: written ones load everywhere, and errors name the broken part of a folder."""

import dataclasses
import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import LIMIT, SMALL, build, relative
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Phi3ForCausalLM

from phimini.model.config import ModelConfig, RopeFactors, preset
from phimini.model.io import safetensors_folder as tensor_files
from phimini.model.io.huggingface import (
    load_config,
    load_reference,
    parameter_shapes,
    read_tensors,
    save_config,
    save_reference,
    write_tensors,
)
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import SamplingParams, sample

OTHER: dict[RopeFactors, RopeFactors] = {"short": "long", "long": "short"}
CONFIGS = {
    "long table": SMALL,
    "short table": dataclasses.replace(SMALL, rope_factors="short"),
    "plain rope, untied": dataclasses.replace(
        SMALL, short_factor=None, long_factor=None, partial_rotary_factor=1.0, tie_embeddings=False
    ),
    "head size apart from the width": dataclasses.replace(SMALL, num_heads=6, num_kv_heads=3),
}


def assert_same_model(a: Phi4Mini, b: Phi4Mini) -> None:
    assert a.config == b.config
    state = b.state_dict()
    assert a.state_dict().keys() == state.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000], ids=["one file", "shards"])
def test_round_trip(config: ModelConfig, shard_bytes: int, tmp_path: Path) -> None:
    model = build(config)
    save_reference(model, tmp_path, stop_ids=(3, 5), max_shard_bytes=shard_bytes)
    assert_same_model(load_reference(tmp_path), model)
    names = {p.name for p in tmp_path.iterdir()}
    assert not any("tmp" in n for n in names)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 10**9)
    if index.exists():
        files = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        assert json.loads(index.read_text())["metadata"]["total_size"] == 4 * config.num_parameters
        # A shard is over the limit only where one tensor is.
        for file in files:
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes


@pytest.mark.parametrize("config", list(CONFIGS.values())[:3], ids=list(CONFIGS)[:3])
def test_transformers_loads_what_we_write(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config)
    save_reference(model, tmp_path / "ours", stop_ids=(3, 5), max_shard_bytes=200_000)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(hf, Phi3ForCausalLM)
    boundary = config.original_max_positions
    tokens_BT = torch.randint(0, config.vocab_size, (1, boundary + 20))
    for T in (boundary - 30, boundary, boundary + 1, boundary + 20):
        with torch.no_grad():
            got, want = hf(tokens_BT[:, :T]).logits, model.logits(model(tokens_BT[:, :T]))
        assert relative(got, want) <= LIMIT, T
    generation = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (generation.eos_token_id, generation.pad_token_id) == ([3, 5], 5)
    # And back from the folder that transformers 5 writes, with rope_parameters.
    hf.save_pretrained(tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_parameters" in raw and "rope_scaling" not in raw
    assert_same_model(load_reference(tmp_path / "theirs"), model)


@pytest.mark.parametrize("rope_factors", ["short", "long"])
def test_transformers_answers_as_we_do_on_both_sides_of_the_boundary(
    rope_factors: RopeFactors, tmp_path: Path
) -> None:
    """Greedy answers of `generate`, with its cache and stop ids; some cross the boundary, some stop."""
    model = build(dataclasses.replace(SMALL, rope_factors=rope_factors), width=12.0)
    save_reference(model, tmp_path, stop_ids=(3, 5))
    hf: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    boundary, generator = SMALL.original_max_positions, torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(8, SMALL.vocab_size, (boundary + n,), generator=generator).tolist()
        for n in (-120, -60, -40, -20, -10, -1, 0, 1, 30)
    ]
    params = SamplingParams(temperature=0.0, max_new_tokens=24, stop_ids=(3, 5))
    ours = sample(model, prompts, params, [0] * len(prompts))
    theirs = [
        hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert theirs == [c.tokens.tolist() for c in ours]
    assert {c.finish_reason for c in ours} == {"stop", "length"}
    other = Phi4Mini(dataclasses.replace(model.config, rope_factors=OTHER[rope_factors]))
    other.load_state_dict(model.state_dict())
    assert [c.tokens.tolist() for c in sample(other, prompts, params, [0] * len(prompts))] != theirs


def phi4_mini_config_json() -> dict:
    """Return the fields of microsoft/Phi-4-mini-instruct's config.json (transformers 4.45) that describe the model."""
    config = preset("phi-4-mini")
    assert config.short_factor is not None and config.long_factor is not None
    return {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1,
        "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
        "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": list(config.long_factor), "short_factor": list(config.short_factor), "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
    }  # fmt: skip


def second_generation(raw: dict) -> dict:
    rope = raw.pop("rope_scaling")
    rope["rope_type"] = rope.pop("type")
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        rope[key] = raw.pop(key)
    return raw | {"rope_parameters": rope}


def write_config(directory: Path, raw: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize(
    "generation", [lambda raw: raw, second_generation], ids=["rope_scaling", "rope_parameters"]
)
def test_phi4_minis_config_of_both_generations(generation: Callable, tmp_path: Path) -> None:
    write_config(tmp_path, generation(phi4_mini_config_json()))
    assert load_config(tmp_path) == preset("phi-4-mini")
    assert load_config(tmp_path, rope_factors="short").rope_factors == "short"


def test_the_shipped_fields_survive(tmp_path: Path) -> None:
    save_config(preset("phi-4-mini"), tmp_path, stop_ids=(200020, 199999), dtype=torch.bfloat16)
    ours, theirs = json.loads((tmp_path / "config.json").read_text()), phi4_mini_config_json()
    assert ours["phimini_rope_factors"] == "long"
    kept = theirs.pop("rope_scaling")
    assert kept.pop("type") == "longrope"
    kept["original_max_position_embeddings"] = theirs.pop("original_max_position_embeddings")
    assert ours["phimini_rope_scaling"] == kept
    # Not used by the architecture, without effect, or the writer's own.
    for key in ("full_attn_mod", "interpolate_factor", "lm_head_bias", "mlp_bias", "transformers_version", "sliding_window"):  # fmt: skip
        theirs.pop(key)
    assert {k: ours[k] for k in theirs} == theirs
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 199999,
        "eos_token_id": [200020, 199999],
        "pad_token_id": 199999,
    }


def test_an_export_has_the_trained_table_under_both_names(tmp_path: Path) -> None:
    for rope_factors in OTHER:
        config = dataclasses.replace(preset("phi-4-mini"), rope_factors=rope_factors)
        save_config(config, tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        assert raw["rope_scaling"] == {
            "type": "longrope",
            "short_factor": list(config.rope_divisors),
            "long_factor": list(config.rope_divisors),
            "attention_factor": config.attention_factor,
            "short_mscale": config.attention_factor,
            "long_mscale": config.attention_factor,
        }
        assert raw["original_max_position_embeddings"] == config.max_positions == 131072
        assert load_config(tmp_path) == config
        AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        assert load_config(tmp_path / "again") == config
        other = dataclasses.replace(config, rope_factors=OTHER[rope_factors])
        assert load_config(tmp_path, other.rope_factors) == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"short_factor": [1.0] * 48}}, r"short_factor: expected \[1.0, 1.11.*\(the long table"),
        ({"rope_scaling": {"short_mscale": 1.0}}, "short_mscale: expected 1.19.*got 1.0"),
        ({"rope_scaling": {"attention_factor": None}}, "attention_factor: expected 1.19.*got None"),
        ({"max_position_embeddings": 65536}, "original_max_position_embeddings: expected 65536 .*got 131072"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings: expected 131072 .*got 4096"),
        ({"phimini_rope_factors": "short"}, r"short_factor: expected \[1.0, 1.0,.*\(the short table"),
        ({"phimini_rope_scaling": None}, "phimini_rope_scaling: expected an object with short_factor, .*got None"),
        ({"phimini_rope_scaling": {"long_factor": [1.0] * 47}}, "long_factor: expected 48 values .*got 47"),
        ({"phimini_rope_scaling": {"original_max_position_embeddings": "4096"}},
         "original_max_positions: expected a whole number .*, got '4096'"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:60],
)  # fmt: skip
def test_an_export_that_was_edited_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    save_config(preset("phi-4-mini"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message) as error:
        load_config(write_config(tmp_path, raw))
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("case", ["no original length", "both dictionaries"])
def test_what_a_file_leaves_open_is_read_as_transformers_does(case: str, tmp_path: Path) -> None:
    raw = phi4_mini_config_json()
    if case == "both dictionaries":
        twice = [2.0 * v for v in raw["rope_scaling"]["long_factor"]]
        raw["rope_parameters"] = raw["rope_scaling"] | {"long_factor": twice}
    else:
        del raw["original_max_position_embeddings"]
    config = load_config(write_config(tmp_path, raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert list(config.long_factor or ()) == theirs.rope_parameters["long_factor"]
    assert config.original_max_positions == theirs.original_max_position_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type: expected 'phi3' or 'llama', got 'mistral'"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type: expected 'default' or 'longrope', got 'yarn'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48}}, "long_factor: expected a list of numbers, got None"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 48, "long_factor": [1] * 47}}, "long_factor: expected 48 values .*got 47"),
        ({"rope_scaling": {"type": "longrope", "mscale": 1.2}}, "unknown key 'mscale'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 48, "long_factor": [2] * 48, "long_mscale": 1.2}},
         "long_mscale: expected 1.19.*got 1.2"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 48, "long_factor": [2] * 48, "attention_factor": 1.0}},
         "attention_factor: expected 1.19.*got 1.0"),
        ({"attention_bias": True}, "attention_bias: expected it off, got True"),
        ({"resid_pdrop": 0.1}, "resid_pdrop: expected it off"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"sliding_window": 2047}, "sliding_window: .*got 2047"),
        ({"sliding_window": "all"}, "sliding_window: .*got 'all'"),
        ({"rope_scaling": "longrope"}, "rope parameters: expected an object, got 'longrope'"),
        ({"rms_norm_eps": -1e-5}, "norm_eps: expected a number above 0 .*, got -1e-05"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps: expected a number above 0 .*, got '1e-5'"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a number above 0 .*, got nan"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor: expected a number above 0 .*, got None"),
        ({"tie_word_embeddings": "no"}, "tie_embeddings: expected true or false, got 'no'"),
        ({"vocab_size": True}, "vocab_size: expected a positive integer, got True"),
        ({"num_key_value_heads": 7}, "num_heads: 24 is not a multiple of num_kv_heads 7"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({"num_hidden_layers": 10**6}, "num_layers: expected a whole number from 1 to 1000, got 1000000"),
        ({"hidden_size": 2**63}, "model_dim: expected a whole number from 1 to 1048576, got 9223372036854775808"),
        ({"partial_rotary_factor": 1e308}, "partial_rotary_factor: expected a number above 0 and up to 1, got 1e.308"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 48, "long_factor": [10**400] * 48}}, "long_factor: expected a list in which each is a number"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 48, "long_factor": [2] * 48, "factor": 10**400}}, "factor: expected 32.0 .*, got 1000"),
        ({"rope_scaling": [1], "phimini_rope_scaling": dict.fromkeys(("short_factor", "long_factor", "original_max_position_embeddings"))},
         "rope parameters: expected an object, got .1."),
        ({"hidden_act": "x" * 100_000}, "hidden_act: expected 'silu', got 'xx"),
        ({"phimini_rope_factors": "auto"}, "rope_factors: expected one of short, long, got 'auto'"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_a_wrong_config_names_file_and_key(change: dict, message: str, tmp_path: Path) -> None:
    write_config(tmp_path, phi4_mini_config_json() | change)
    with pytest.raises(ValueError, match=message) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert len(str(error.value)) < 600


def test_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json: not valid JSON: maximum recursion depth"):
        load_config(tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_reference(build(), tmp_path, max_shard_bytes=100_000)
    return tmp_path


def edit_shard(directory: Path, name: str, edit: Callable[[dict], object]) -> str:
    """Rewrite the shard that holds a tensor; return its file name."""
    file = json.loads((directory / tensor_files.INDEX_FILE).read_text())["weight_map"][name]
    tensors = load_file(directory / file)
    edit(tensors)
    save_file(tensors, directory / file)
    return file


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def edit_index(directory: Path, edit: Callable[[dict], object]) -> None:
    path = directory / tensor_files.INDEX_FILE
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_tensor(saved: Path) -> None:
    file = edit_shard(saved, NORM, lambda t: (t.pop(NORM), t.update(other=torch.ones(1))))
    with pytest.raises(ValueError, match=f"{file}: has no tensor '{NORM}', which"):
        load_reference(saved)
    edit_index(saved, lambda m: m.pop(NORM))
    with pytest.raises(ValueError, match=rf"tensor {NORM} is missing; expected shape \(128,\)"):
        load_reference(saved)


def test_extra_tensor(saved: Path) -> None:
    file = edit_shard(saved, NORM, lambda t: t.update({"model.layers.9.bias": torch.ones(2)}))
    edit_index(saved, lambda m: m.update({"model.layers.9.bias": file}))
    with pytest.raises(
        ValueError, match=f"{file}: tensor 'model.layers.9.bias' is none of this model's"
    ):
        load_reference(saved)


def test_wrong_shape_and_type(saved: Path) -> None:
    file = edit_shard(saved, DOWN, lambda t: t.update({DOWN: t[DOWN].T.contiguous()}))
    with pytest.raises(
        ValueError, match=rf"{file}: {DOWN}: expected shape \(128, 192\), got \(192, 128\)"
    ):
        load_reference(saved)
    for dtype, theirs in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        quantised = torch.ones(128, 192).to(dtype)
        edit_shard(saved, DOWN, lambda t, q=quantised: t.update({DOWN: q}))
        with pytest.raises(ValueError, match=f"{file}: {DOWN}: expected F64, .*, got {theirs}"):
            load_reference(saved, dtype=torch.float32)


def test_missing_and_cut_off_files(saved: Path) -> None:
    file = saved / json.loads((saved / tensor_files.INDEX_FILE).read_text())["weight_map"][DOWN]
    whole = file.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:5], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.name}: not a whole safetensors file"):
            load_reference(saved)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: no such file"):
        load_reference(saved)


def test_an_index_cannot_leave_its_folder(saved: Path) -> None:
    edit_index(saved, lambda m: m.update({NORM: "../model.safetensors"}))
    with pytest.raises(
        ValueError, match="expected file names in this folder, got '../model.safetensors'"
    ):
        load_reference(saved)


def test_tied_head_stored_twice(saved: Path) -> None:
    embedding = "model.embed_tokens.weight"
    file = edit_shard(
        saved, embedding, lambda t: t.update({"lm_head.weight": t[embedding].clone()})
    )
    edit_index(saved, lambda m: m.update({"lm_head.weight": file}))
    assert_same_model(load_reference(saved), build())
    edit_shard(saved, embedding, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_reference(saved)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    save_config(SMALL, tmp_path)
    torch.save(build().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match="expected model.safetensors or model.safetensors.index.json, found neither",
    ):
        load_reference(tmp_path)


def test_ambiguous_folder(saved: Path) -> None:
    save_file({"a": torch.ones(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="has both model.safetensors and"):
        read_tensors(saved)


def test_a_save_that_fails_leaves_the_old_weights(saved: Path) -> None:
    new = build(seed=1)
    before = sorted(saved.iterdir())

    def fails_late():
        for i, item in enumerate(new.named_parameters()):
            if i == 9:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        write_tensors(fails_late(), saved, max_shard_bytes=100_000)
    assert sorted(saved.iterdir()) == before
    assert_same_model(load_reference(saved), build())


def test_a_full_disk_is_an_os_error_with_the_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2].startswith("..tmp-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files.os, "fsync", full)
    with pytest.raises(
        OSError,
        match=r"cannot write: No space left on device; no file was left: .*\.tmp-.*safetensors",
    ):
        save_reference(build(seed=1), saved)
    assert_same_model(load_reference(saved), build())


def test_a_new_save_replaces_other_layouts(saved: Path) -> None:
    new = build(seed=1)
    save_reference(new, saved)  # shards before, one file now
    assert_same_model(load_reference(saved), new)
    assert [p.name for p in saved.glob("*.safetensors*")] == ["model.safetensors"]
    save_reference(build(), saved, max_shard_bytes=200_000)
    assert_same_model(load_reference(saved), build())
    assert not (saved / "model.safetensors").exists()


def test_tensors_are_read_one_at_a_time(saved: Path) -> None:
    files = read_tensors(saved)
    model = build()
    assert set(files) == set(parameter_shapes(SMALL)) and len(files) == 14
    assert files.shape(DOWN) == (128, 192)
    assert torch.equal(files[DOWN], model.get_parameter(DOWN))
    assert files[DOWN] is not files[DOWN]
    assert load_reference(saved, dtype=torch.bfloat16).head_weight_VD.dtype == torch.bfloat16


def test_wrong_writes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tensors to write"):
        write_tensors([], tmp_path)
    with pytest.raises(ValueError, match="tensor a came twice"):
        write_tensors([("a", torch.ones(1)), ("a", torch.ones(1))], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_slices_of_one_storage_can_be_written(tmp_path: Path) -> None:
    fused = torch.randn(6, 4)
    write_tensors([("q", fused[:4]), ("k", fused[4:]), ("t", fused.T)], tmp_path)
    files = read_tensors(tmp_path)
    assert torch.equal(files["q"], fused[:4]) and torch.equal(files["k"], fused[4:])
    assert torch.equal(files["t"], fused.T)


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
