"""Token ids of training examples in Megatron-core's indexed datasets: encoded once, in shards, and mapped by every rank.

A set is a folder of shards. `N.bin` holds int32 ids, `N.idx` the lengths of sequences (`megatron.core.datasets.indexed_dataset`).
A document is two sequences, prompt and answer, so the loss mask needs no file. `N.npy` holds the CRC-32 of each document,
which is checked when the document is read: to check all of a set before the first step would take minutes.
"""

import hashlib
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from phimini.model.io.chat import TEMPLATES, encode_example
from phimini.model.io.json_files import Span, atomic_file, numbered_rows, spans
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.ranks.process import LostWorkerError, end_with_parent
from phimini.parallel.training.batch import digest
from phimini.stages.data.packing import Example

NOTE_EVERY_S = 0.5
"""between two counts of encoded rows"""
SHARD_BYTES = 64 << 20
"""of JSON Lines in a shard, whatever the number of processes"""


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows of a file, and the files of their tokens."""

    rows: Path
    span: Span
    prefix: Path

    @property
    def files(self) -> list[Path]:
        """The shard's files; the last is written when the others are whole."""
        return [self.prefix.with_suffix(suffix) for suffix in (".bin", ".npy", ".idx")]


def shards_of(rows: Path, folder: Path) -> list[Shard]:
    """Return the shards of a JSON-lines file, to be written into `folder`. Raises ValueError for an empty file."""
    parts = list(spans(rows, SHARD_BYTES))
    if not parts:
        raise ValueError(f"{rows}: expected at least one row, got an empty file")
    return [Shard(rows, span, folder / f"{number:05d}") for number, span in enumerate(parts)]


def write_shard(
    shard: Shard, tokenizer: Tokenizer, template: str, note: Callable[[], None] | None = None
) -> Shard:
    """Encode `question` and `response` of a shard's rows into its files, and return it.

    note: called after each row; default: count it for the process that started this worker. Raises ValueError that names file and line of a bad row.
    """
    data_path, checksum_path, index_path = shard.files
    checksums = []
    with (
        atomic_file(index_path) as index,
        atomic_file(checksum_path) as checksum_file,
        atomic_file(data_path) as data,
    ):
        builder = IndexedDatasetBuilder(data.name, dtype=np.int32)
        for line, row in numbered_rows(shard.rows, {"question": str, "response": str}, span=shard.span):  # fmt: skip
            try:
                ids, loss_from = encode_example(
                    tokenizer, row["question"], row["response"], template
                )
            except ValueError as error:
                raise ValueError(f"{shard.rows}, line {line}, {error}") from error
            document = torch.tensor(ids, dtype=torch.int32)
            builder.add_document(document, [loss_from, len(ids) - loss_from])
            checksums.append(zlib.crc32(document.numpy().data))
            (note or _count_row)()
        np.save(checksum_file, np.array(checksums, np.uint32))
        builder.finalize(index.name)
    return shard


def write_shards(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    template: str,
    workers: int,
    note: Callable[[int], None] = lambda rows: None,
) -> Iterator[Shard]:
    """Write the shards in up to `workers` processes, and yield each when it is whole.

    note: called with the number of rows that are encoded, often. Raises as `write_shard`, and LostWorkerError if one of the
    processes died.
    """
    work: Callable[[Shard], Shard] = partial(write_shard, tokenizer=tokenizer, template=template)
    workers = min(workers, len(shards))
    if workers < 2:
        rows = count(1)
        yield from (work(shard, note=lambda: note(next(rows))) for shard in shards)
        return
    # Spawned: the rank that calls this may have joined a process group, whose threads survive no fork.
    context = multiprocessing.get_context("spawn")
    encoded = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), encoded)) as pool:
        left = {pool.submit(work, shard) for shard in shards}
        try:
            while left:
                done, left = wait(left, timeout=NOTE_EVERY_S, return_when=FIRST_COMPLETED)
                note(encoded.get_obj().value)  # without the lock, which a killed worker may hold
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise LostWorkerError("tokenize.workers", "encodes rows") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()  # what it has half written is in temporary files
            raise


_encoded: Any = None
"""a worker's counter of encoded rows, shared with the others and their parent"""


def _count_row() -> None:
    if _encoded is not None:
        with _encoded.get_lock():
            _encoded.value += 1


def _start_worker(parent: int, encoded: Any) -> None:
    """Prepare a process that ends with its parent; Ctrl-C reaches it too, and ends it without a traceback."""
    global _encoded
    _encoded = encoded
    end_with_parent()
    if os.getppid() != parent:  # it ended while this process was starting
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def fingerprint(tokenizer: Tokenizer, template: str) -> dict[str, str]:
    """Return the sha256 of the tokenizer and of the text of the chat template."""
    texts = {
        "tokenizer": tokenizer.inner.to_str(),
        "chat_template": TEMPLATES.get(template, template),
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


class TokenSet(Sequence[Example]):
    """The examples of a set, in the order of its rows. Tokens stay in the files: an example is a view of the page cache."""

    def __init__(self, folder: Path, rows: Path, *, loss_on_question: bool = False) -> None:
        """rows: the file they were made of, for error messages. loss_on_question: train on the question's tokens too."""
        self.folder, self.rows, self.loss_on_question = folder, rows, loss_on_question
        prefixes = [path.with_suffix("") for path in sorted(folder.glob("*.idx"))]
        self._shards = [IndexedDataset(str(prefix)) for prefix in prefixes]
        self._checksums = [np.load(f"{prefix}.npy", mmap_mode="r") for prefix in prefixes]
        self._starts = np.cumsum([0, *map(len, self._checksums)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, place: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the example of row `place`, from 0. Raises ValueError if its tokens are damaged."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        number = int(np.searchsorted(self._starts, place, "right")) - 1
        shard, first = self._shards[number], 2 * (place - int(self._starts[number]))
        prompt, answer = shard.index.sequence_lengths[first : first + 2].tolist()
        start = int(shard.index.sequence_pointers[first])
        tokens = shard.bin_reader.read(np.int32, prompt + answer, start)
        if zlib.crc32(tokens.data) != self._checksums[number][first // 2]:
            raise ValueError(
                f"{shard.path_prefix}.bin: the tokens of {self.name_of(place)} do not match their checksum: the file is damaged"
            )
        return Example(self.name_of(place), tokens, 0 if self.loss_on_question else prompt)

    def name_of(self, place: int) -> str:
        """Return file and line of the row of an example."""
        return f"{self.rows}:{place + 1}"

    @property
    def lengths(self) -> np.ndarray:
        """The number of input positions of each example, one fewer than tokens; (examples,) int32."""
        both = [shard.sequence_lengths.reshape(-1, 2) for shard in self._shards]
        return np.concatenate([pair.sum(1, dtype=np.int32) - 1 for pair in both])

    @property
    def trained_shares(self) -> np.ndarray:
        """The share of each example's input positions that carry loss; (examples,) float64."""
        if self.loss_on_question:
            return np.ones(len(self))
        answers = [shard.sequence_lengths.reshape(-1, 2)[:, 1] for shard in self._shards]
        return np.concatenate(answers) / self.lengths

    def digest(self) -> int:
        """Return a checksum of all that training sees."""
        return digest(
            [checksums.tobytes() for checksums in self._checksums],
            [shard.sequence_lengths.tobytes() for shard in self._shards],
            self.loss_on_question,
        )

    def counts(self) -> dict[str, int]:
        """Return the numbers of documents, shards, tokens, and tokens of answers."""
        both = np.sum([s.sequence_lengths.reshape(-1, 2).sum(0, dtype=np.int64) for s in self._shards], 0)  # fmt: skip
        return {"documents": len(self), "shards": len(self._shards), "tokens": int(both.sum()), "answer_tokens": int(both[1])}  # fmt: skip
