"""The tokenize stage: same batches as from memory, resumed after kills, stale inputs named, a file larger than the memory."""

import dataclasses
import multiprocessing
import os
import re
import shutil
import signal
import time
import types
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from forked_ranks import run_ranks
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from recipe_cases import MICRO, with_data

from phimini.model.config import preset
from phimini.model.io.chat import TEMPLATES, encode_example
from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import read_rows, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.training.batch import PackedBatch, pack
from phimini.stages import cli, midtrain, sft
from phimini.stages.base import base
from phimini.stages.cli import main
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.data import token_files
from phimini.stages.data.packing import (
    EpochSampler,
    Example,
    best_fit,
    derive,
    documents,
    flops_of,
    micro_batches,
)
from phimini.stages.run.outputs import write_summary
from phimini.stages.run.remains import remove_remains
from phimini.stages.run.stage_folder import Stage
from phimini.stages.tokenize import tokenize

SPARSE_BYTES = psutil.virtual_memory().total + (1 << 30)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "micro"
    return with_data(out)


def run_in(out: Path, *words: str) -> RunConfig:
    return override(tiny(), [f"out={out}", *MICRO, *words])


# --- the same batches as from memory --------------------------------------------------------------
def trained_on(words: list[str], module: Any, stages: list[str]) -> list[Batch]:
    """Run stages in this rank and return every micro-batch of `module`'s steps."""
    seen: list[Batch] = []
    start = module.start_step

    def start_step(model: Any, microbatches: list[PackedBatch], head: Any) -> Any:
        seen.extend((b.tokens_T, b.targets_T, b.cu_seqlens) for b in microbatches)
        return start(model, microbatches, head)

    module.start_step = start_step
    assert [main([stage, *words]) for stage in stages] == [0] * len(stages)
    return seen


def from_memory(out: Path, name: str, *, loss_on_question: bool) -> list[Example]:
    tokenizer = Tokenizer.load(out / "base" / "model")
    encoded = [
        encode_example(tokenizer, row["question"], row["response"])
        for row in read_rows(out / "curate" / f"{name}.jsonl", {})
    ]
    return [Example("", ids, 0 if loss_on_question else start) for ids, start in encoded]


@pytest.mark.parametrize("loss_on_question", [False, True])
def test_stage_1_trains_on_the_batches_of_the_rows_in_memory(
    loss_on_question: bool, made: Path, tmp_path: Path
) -> None:
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(made / name, tmp_path / name)
    words = ["tiny", f"out={tmp_path}", *MICRO, f"midtrain.loss_on_question={loss_on_question}",
             "midtrain.steps=none", "midtrain.epochs=2", "midtrain.sequence_length=192"]  # fmt: skip
    seen = run_ranks(trained_on, 1, words, midtrain, ["midtrain"])[0]
    examples = from_memory(made, "midtrain", loss_on_question=loss_on_question)
    rows = list(best_fit([len(e) for e in examples], 192))
    per_step = tiny().midtrain.rows_per_step
    sampler = EpochSampler(len(rows), per_step, derive(0, "midtrain"))
    world: Any = types.SimpleNamespace(data_size=1, data_rank=0)
    want = []
    for step in range(-(-2 * len(rows) // per_step)):
        some = [[examples[i] for i in rows[r]] for r in sampler.batch(step)]
        costs = [flops_of([len(e) for e in row], preset("tiny")) for row in some]
        make = lambda part: pack(documents([e for row in part for e in row]))
        want += micro_batches(some, [1] * len(some), costs, 2, world, make)
    same_batches(seen, want)


def test_stage_2_trains_on_the_batches_of_the_rows_in_memory(made: Path, tmp_path: Path) -> None:
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(made / name, tmp_path / name)
    seen = run_ranks(trained_on, 1, ["tiny", f"out={tmp_path}", *MICRO], sft, ["midtrain", "sft"])[
        0
    ]
    examples = from_memory(made, "sft", loss_on_question=False)
    sampler = EpochSampler(len(examples), 16, derive(0, "sft"))
    world: Any = types.SimpleNamespace(data_size=1, data_rank=0)
    want = []
    for step in range(len(examples) // 16):
        some = [examples[i] for i in sampler.batch(step)]
        lengths = [len(e) for e in some]
        costs = [flops_of([length], preset("tiny")) for length in lengths]
        make = lambda part: pack(documents(part))
        want += micro_batches(some, lengths, costs, 1024, world, make)
    same_batches(seen, want)


def same_batches(seen: list[Batch], want: list[PackedBatch]) -> None:
    assert len(seen) == len(want) > 4
    for got, batch in zip(seen, want, strict=True):
        for tensor, other in zip(got, (batch.tokens_T, batch.targets_T, batch.cu_seqlens), strict=True):  # fmt: skip
            assert tensor.dtype == other.dtype and torch.equal(tensor, other)


# --- resume ---------------------------------------------------------------------------------------
def files(folder: Path) -> dict[str, bytes]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def killed(run: RunConfig, after: int, pids: Path) -> None:
    """Run the stage in a forked process that is killed once `after` shards are recorded."""
    pid = os.fork()
    if pid == 0:
        record = Stage.record
        count = 0

        def then_killed(self: Stage, *names: str) -> None:
            nonlocal count
            record(self, *names)
            count += 1
            if count == after:
                children = psutil.Process().children(recursive=True)
                pids.write_text(" ".join(str(child.pid) for child in children))
                os.kill(os.getpid(), signal.SIGKILL)

        Stage.record = then_killed
        tokenize(run)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(("after", "workers"), [(1, 1), (4, 1), (3, 2)])
def test_a_killed_stage_keeps_its_shards_and_ends_with_the_same_bytes(
    after: int, workers: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("distill", "curate", "base"):
        os.symlink(made / name, tmp_path / name)
    monkeypatch.setattr(token_files, "SHARD_BYTES", 8192)
    run = run_in(tmp_path, f"tokenize.workers={workers}")
    killed(run, after, tmp_path / "pids")
    deadline = time.monotonic() + 60  # a worker that is starting ends once its imports are done
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    kept = list(read_sealed(tmp_path / "tokenize" / "begun.json")["files"])
    assert len(kept) == 3 * after
    remove_remains(tmp_path)  # as a command does once it has the run's lock
    times = {name: (tmp_path / "tokenize" / name).stat().st_mtime_ns for name in kept}
    tokenize(dataclasses.replace(run, tokenize=dataclasses.replace(run.tokenize, workers=1)))
    assert {name: (tmp_path / "tokenize" / name).stat().st_mtime_ns for name in kept} == times
    whole = files(tmp_path / "tokenize")
    assert len(whole) > 3 * 6
    tokenize(run, redo=True)
    assert files(tmp_path / "tokenize") == whole


def test_a_worker_that_is_killed_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("distill", "curate", "base"):
        os.symlink(made / name, tmp_path / name)

    def first_killed(futures: set[Future], **how: Any) -> tuple[set[Future], set[Future]]:
        next(iter(multiprocessing.active_children())).kill()
        return wait(futures, **how)

    monkeypatch.setattr(token_files, "SHARD_BYTES", 8192)
    monkeypatch.setattr(token_files, "wait", first_killed)
    monkeypatch.setattr(cli, "dispatch", lambda arguments: tokenize(run_in(tmp_path, "tokenize.workers=2")))  # fmt: skip
    assert cli.exit_status([]) == (1, False)
    assert capsys.readouterr().err == "phimini: tokenize.workers: a process that encodes rows died; `dmesg` tells whether memory ran out\n"  # fmt: skip


def test_an_unfinished_stage_does_not_go_on_as_another(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("distill", "curate", "base"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.setattr(token_files, "SHARD_BYTES", 8192)
    killed(run_in(tmp_path, "tokenize.workers=1"), 2, tmp_path / "pids")
    with pytest.raises(ValueError, match="tokenize was made with chat_template=instruct, now it is reasoning"):  # fmt: skip
        tokenize(run_in(tmp_path, "chat_template=reasoning"))
    base(run_in(tmp_path), redo=True)
    with pytest.raises(ValueError, match="tokenize: base was made again since"):
        tokenize(run_in(tmp_path))


# --- stale inputs ---------------------------------------------------------------------------------
def changed_template(out: Path) -> None:
    changed_tokenizer(out, TEMPLATES["instruct"] + " ", [])


def changed_tokenizer(
    out: Path, template: str = TEMPLATES["instruct"], tokens: Sequence[str] = ("sum",)
) -> None:
    """Let the start model have a tokenizer of its own, in a folder that is whole."""
    path = out / "base" / "model"
    tokenizer = Tokenizer.load(path)
    tokenizer.inner.add_tokens(list(tokens))
    tokenizer.save(path, chat_template=template)
    summary = read_sealed(out / "base" / "summary.json")
    write_summary(out / "base", {k: v for k, v in summary.items() if k != "files"})


def changed_rows(out: Path) -> None:
    path = out / "curate" / "sft.jsonl"
    write_rows(path, read_rows(path, {})[::-1])  # of the same size


STALE = {
    "chat_template=reasoning": (None, r"tokenize was made with chat_template=instruct, now it is reasoning"),
    "template": (changed_template, r"tokenize: was made with another chat_template \(sha256 \w{12}\)"),
    "tokenizer": (changed_tokenizer, r"base/model/tokenizer\.json: (has|its content has changed).*: the file is damaged"),
    "rows": (changed_rows, r"curate/sft\.jsonl: its content has changed since it was written: .*: the file is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("change", STALE)
def test_tokens_of_other_inputs_are_refused(
    change: str, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for name in ("distill", "curate", "base", "tokenize"):
        shutil.copytree(made / name, tmp_path / name)
    action, message = STALE[change]
    more = [change] if "=" in change else []

    def run() -> int:
        if action is not None:
            action(tmp_path)
        return main(["midtrain", "tiny", f"out={tmp_path}", *MICRO, *more])

    assert run_ranks(run, 1) == [2]
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "midtrain" / "model").exists()


# --- a file larger than the memory ------------------------------------------------------------------
def make_sparse(folder: Path, num_bytes: int) -> np.ndarray:
    """Write a token set of so many bytes of token 0, without its blocks on the disk; return the documents' lengths."""
    shutil.rmtree(folder)
    folder.mkdir()
    kinds = np.random.default_rng(0).lognormal(8.6, 0.5, 64).astype(np.int64).clip(16, 16_000)
    lengths = np.resize(kinds, num_bytes // 4 // int(kinds.mean()))
    checksums = {n: zlib.crc32(bytes(4 * n)) for n in kinds.tolist()}
    builder = IndexedDatasetBuilder(f"{folder}/00000.bin", dtype=np.int32)
    both = np.stack([np.full(len(lengths), 8), lengths - 8], 1)
    builder.sequence_lengths = both.reshape(-1).tolist()
    builder.document_indices = list(range(0, 2 * len(lengths) + 1, 2))
    builder.finalize(f"{folder}/00000.idx")
    os.truncate(f"{folder}/00000.bin", 4 * int(lengths.sum()))
    np.save(f"{folder}/00000.npy", np.array([checksums[n] for n in lengths.tolist()], np.uint32))
    return lengths


def private_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])  # fmt: skip
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))


def first_batch(words: list[str]) -> tuple[float, int, int, bool]:
    """Return the seconds and private bytes up to a rank's first step, its tokens, and whether all of them are 0."""
    began, before = time.perf_counter(), private_bytes()

    class Reached(Exception):
        pass

    def start_step(model: Any, microbatches: list[PackedBatch], head: Any) -> None:
        raise Reached(time.perf_counter() - began, private_bytes() - before, microbatches)

    midtrain.start_step = start_step
    with pytest.raises(Reached) as caught:
        main(words)
    seconds, private, microbatches = caught.value.args
    tokens = [b.tokens_T for b in microbatches]
    return seconds, private, sum(map(len, tokens)), not any(bool(x.any()) for x in tokens)


def test_ranks_start_on_a_file_larger_than_the_memory(made: Path, tmp_path: Path) -> None:
    for name in ("distill", "curate", "base", "tokenize"):
        shutil.copytree(made / name, tmp_path / name)
    lengths = make_sparse(tmp_path / "tokenize" / "midtrain", SPARSE_BYTES)
    summary = read_sealed(tmp_path / "tokenize" / "summary.json")
    name, size = "midtrain/00000.bin", 4 * int(lengths.sum())
    assert size > 0.99 * SPARSE_BYTES
    del summary["files"]
    write_summary(tmp_path / "tokenize", summary, {name: {"bytes": size, "sha256": ""}})
    words = ["midtrain", "tiny", f"out={tmp_path}", *MICRO, "processes=2", "midtrain.rows_per_step=8",
             "midtrain.sequence_length=16384"]  # fmt: skip
    for seconds, private, tokens, are_zero in run_ranks(first_batch, 2, words):
        print(f"{size / 1e9:.1f} GB, {len(lengths):,} documents: {seconds:.1f} s, {private / 1e6:.0f} MB private")  # fmt: skip
        assert seconds < 30 and private < 300e6
        assert are_zero and 0.9 * 4 * 16384 < tokens <= 4 * 16384
