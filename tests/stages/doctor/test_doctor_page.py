"""`phimini doctor RECIPE`: every line on a machine that is well, and what each kind of damage makes of it."""

import dataclasses
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rl_run import make_run
from rollout_cases import LONG

from phimini.model.io.chat import TEMPLATES, render
from phimini.model.io.huggingface import load_reference, save_reference
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.stages.cli import main
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.doctor import base_model, machine
from phimini.stages.doctor.base_model import cases_of, parity_lines, tokenizer_lines
from phimini.stages.doctor.machine import conflicts_of, disk_lines, written_bytes

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny model and a tokenizer of all characters of the doctor's texts."""
    folder = make_run(tmp_path_factory.mktemp("base") / "run") / "rollout_dpo" / "model"
    tokenizer = train_tiny_tokenizer(list(base_model.TEXTS) * 3, vocab_size=256)
    save_reference(load_reference(folder), folder, stop_ids=tokenizer.stop_ids)
    tokenizer.save(folder, chat_template=TEMPLATES["instruct"])
    return folder


def published(folder: Path) -> Path:
    """Write the config as Microsoft does: both tables, of which a reader takes one by the length of the text."""
    path = folder / "config.json"
    raw = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("phimini")}
    scaling = {
        "type": "longrope",
        "short_factor": LONG.short_factor,
        "long_factor": LONG.long_factor,
    }
    raw |= {
        "rope_scaling": scaling,
        "original_max_position_embeddings": LONG.original_max_positions,
    }
    path.write_text(json.dumps(raw))
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "base"))


def page(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Return the exit status, and status and text of each line by its name."""
    status = main(["doctor", "tiny", *words, "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    lines = {line["name"]: (line["status"], line["text"]) for line in document["lines"]}
    assert sum(document["counts"].values()) == len(document["lines"])
    return status, lines


def test_a_machine_that_is_well(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = page(capsys, f"out={tmp_path / 'run'}", f"base={folder}")
    assert status == 0 and "fail" not in {of_one for of_one, _ in lines.values()}
    for name in ("disk", "write speed", "tokenizer", "template", "attention"):
        assert lines[name][0] == "ok", lines[name]
    assert "torch 2" in lines["versions"][1] and "megatron-core" in lines["versions"][1]
    assert "s per checkpoint" in lines["write speed"][1]
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".doctor*"))
    # The page and a file of JSON, with the figures.
    path = tmp_path / "page.json"
    assert main(["doctor", "tiny", f"out={tmp_path / 'run'}", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "ok   disk: " in said and said.splitlines()[-1].endswith(" 0 fail")
    (disk,) = [row for row in json.loads(path.read_text())["lines"] if row["name"] == "disk"]
    assert disk["number"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = override(tiny(), [f"out={tmp_path / 'run'}", "rlvr.steps=100000000"])
    parts = written_bytes(run, LONG)
    assert parts["checkpoints"] == 3 * 12 * LONG.num_parameters
    sure = parts["checkpoints"] + parts["models"]
    for free, want in ((sure - 1, "fail"), (sure, "warn"), (sum(parts.values()), "ok")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, f=free: Usage(0, 0, f))
        assert next(disk_lines(run, LONG)).status == want

    def full(folder: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine, "write_rate", full)
    assert [(line.status, "No space left" in line.text) for line in disk_lines(run, LONG)][1] == ("fail", True)  # fmt: skip
    monkeypatch.setattr(machine, "write_rate", lambda _: LONG.num_parameters / 100.0)
    slow = list(disk_lines(run, LONG))[1]
    assert (slow.status, slow.number) == ("warn", 1200.0)


def test_a_requirement_that_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch==1.0", "numpy", "absent>=3", 'tokenizers<0.1; extra == "x"', "setuptools<1"]
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda _: needed)
    assert [name for name, _ in conflicts_of("phimini")] == ["torch", "setuptools"]
    lines = [line for line in machine.version_lines(tiny()) if line.name == "conflict"]
    assert {(line.status, "torch==1.0" in line.text) for line in lines} == {("fail", True), ("warn", False)}  # fmt: skip


def test_packages_that_the_recipe_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: None)
    run = override(tiny(), ["fp8=te", "rollout.engine=vllm"])
    lines = {line.name: line for line in machine.version_lines(run)}
    assert lines["vllm"].status == lines["transformer-engine"].status == "fail"
    lines = {line.name: line for line in machine.version_lines(tiny())}
    assert lines["vllm"].status == lines["transformer-engine"].status == "warn"


def test_a_template_and_a_tokenizer_that_do_not_come_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = override(tiny(), [f"base={folder}"])
    assert [line.status for line in tokenizer_lines(run, folder)] == ["ok", "ok"]
    # A template without the question, and one whose question is changed.
    for template in ("{{ 'hello' }}", "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(base_model, "render", lambda *_, t=template, **__: base_model_render(t))
            assert [line.status for line in tokenizer_lines(run, folder)] == ["ok", "fail"]
    decode = Tokenizer.decode
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode", lambda self, ids, skip_special=False: decode(self, ids, skip_special).replace("\t", " "))  # fmt: skip
        assert [line.status for line in tokenizer_lines(run, folder)] == ["warn", "ok"]
    (folder / "tokenizer.json").write_text("{")
    (line,) = tokenizer_lines(run, folder)
    assert line.status == "fail" and "tokenizer.json" in line.text


def base_model_render(template: str) -> str:
    return render([{"role": "user", "content": base_model.TEXTS[0]}], template, True)


def test_the_lengths_are_around_the_boundary() -> None:
    boundary = LONG.original_max_positions
    cases = cases_of(LONG)
    assert [(len(case.tokens), case.table) for case in cases] == [(boundary - 7, "short"), (boundary, "short"), (boundary + 9, "long")]  # fmt: skip
    assert [len(c.tokens) for c in cases_of(dataclasses.replace(LONG, short_factor=None, long_factor=None))] == [64]  # fmt: skip


def parity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the status of each line of the chain, with the local engine."""
    find = base_model.importlib.util.find_spec
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))  # fmt: skip
    lines = parity_lines(override(tiny(), [f"base={folder}"]), folder)
    return {line.name.removeprefix("parity: "): line.status for line in lines}


@pytest.mark.parametrize("kind", [published, Path], ids=["published", "export"])
def test_the_chain_on_a_sound_checkpoint(
    kind: Callable[[Path], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parity(kind(folder), monkeypatch)
    assert len(found) == 1 + 3 + 3 + 1 + 3
    assert {name for name, status in found.items() if status != "ok"} == {"vllm"}, found


def test_the_implementation_that_differs_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the boundary the reference gets the other table."""
    load = base_model.load_reference
    monkeypatch.setattr(base_model, "load_reference", lambda *a, **k: load(*a, **k | {"rope_factors": "short"}))  # fmt: skip
    found = parity(published(folder), monkeypatch)
    wrong = {name for name, status in found.items() if status == "fail"}
    assert {name for name in found if "above" in name} == wrong and wrong


def test_a_damaged_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_reference(folder)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = torch.nan
    save_reference(model, folder, stop_ids=Tokenizer.load(folder).stop_ids)
    assert parity(folder, monkeypatch) == {"reference": "fail"}
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    status, lines = page(capsys, f"base={folder}", f"out={folder}/run", "--parity")
    assert status == 1 and lines["parity: reference"][0] == "fail"
    assert file.name in lines["parity: reference"][1]
    assert main(["doctor", "tiny", "--parity"]) == 2
    assert "--parity: expected base=FOLDER" in capsys.readouterr().err
