"""A run that starts from another run's model: the same rope tables and weights, and never silently the other table."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from phimini.model.config import RopeFactors, preset
from phimini.model.io.huggingface import load_config, load_reference, save_reference
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.model.reference import Phi4Mini
from phimini.stages.base import base, base_config
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.run.outputs import write_summary


def export(folder: Path, rope_factors: RopeFactors) -> Phi4Mini:
    model = Phi4Mini(dataclasses.replace(preset("tiny"), rope_factors=rope_factors))
    model.init_weights(0)
    tokenizer = train_tiny_tokenizer(["What is 1 + 2?"] * 9)
    save_reference(model, folder, stop_ids=tokenizer.stop_ids)
    tokenizer.save(folder)
    return model


def run_from(folder: Path, *words: str) -> RunConfig:
    (folder / "run" / "curate").mkdir(parents=True, exist_ok=True)
    write_summary(folder / "run" / "curate", {"id": "rows"})
    return override(tiny(), [f"base={folder / 'export'}", f"out={folder / 'run'}", *words])


@pytest.mark.parametrize("rope_factors", ["short", "long"])
def test_a_run_goes_on_from_an_export(rope_factors: RopeFactors, tmp_path: Path) -> None:
    model = export(tmp_path / "export", rope_factors)
    run = run_from(tmp_path, f"rope_factors={rope_factors}")
    assert base_config(run) == model.config
    started = base(run) / "model"
    again = load_reference(started)
    assert again.config == model.config
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name
    text = "What is 1 + 2?"
    assert Tokenizer.load(started).encode(text) == Tokenizer.load(run.base).encode(text)


@pytest.mark.parametrize("trained", ["short", "long"])
def test_the_other_table_is_refused_before_anything_is_written(
    trained: RopeFactors, tmp_path: Path
) -> None:
    export(tmp_path / "export", trained)
    run = run_from(tmp_path, f"rope_factors={'long' if trained == 'short' else 'short'}")
    with pytest.raises(
        ValueError, match=f"its {trained} rope table, .*expected rope_factors={trained}"
    ):
        base(run)
    assert not (tmp_path / "run" / "base" / "model").exists()


def test_a_folder_that_names_no_table_is_trained_with_the_runs(tmp_path: Path) -> None:
    export(tmp_path / "export", "long")
    path = tmp_path / "export" / "config.json"
    raw = json.loads(path.read_text())
    kept = raw.pop("phimini_rope_scaling")
    raw["original_max_position_embeddings"] = kept.pop("original_max_position_embeddings")
    raw["rope_scaling"] = {"type": "longrope", **kept}
    del raw["phimini_rope_factors"]
    path.write_text(json.dumps(raw))
    for rope_factors in ("short", "long"):
        run = run_from(tmp_path, f"rope_factors={rope_factors}")
        assert base_config(run) == load_config(run.base, run.rope_factors)
        assert base_config(run).rope_factors == rope_factors


def test_another_base_model_at_the_same_path_is_named(tmp_path: Path) -> None:
    export(tmp_path / "export", "long")
    run = run_from(tmp_path)
    base(run)
    base(run)
    path = tmp_path / "export" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"export/model\.safetensors has changed since .*run/base"):
        base(run)
    (tmp_path / "export" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has changed|tokenizer_config.json is gone since"):
        base(run)
