"""Token files: examples come back as they were encoded, from any number of shards, and damage is named."""

from pathlib import Path

import numpy as np
import pytest

from phimini.model.io.chat import encode_example
from phimini.model.io.json_files import numbered_rows, spans, write_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.stages.data import token_files
from phimini.stages.data.token_files import TokenSet, shards_of, write_shard

ROWS = [
    {"question": f"What is {n} + {n}?", "response": f"{'so ' * (n % 7)}\\boxed{{{2 * n}}}"}
    for n in range(60)
]
TOKENIZER = train_tiny_tokenizer([row["question"] + row["response"] for row in ROWS])


@pytest.fixture(params=[300, 10**9], ids=["shards", "one shard"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> TokenSet:
    monkeypatch.setattr(token_files, "SHARD_BYTES", request.param)
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, ROWS)
    shards = shards_of(rows, tmp_path / "tokens")
    assert (len(shards) == 1) == (request.param == 10**9)
    for shard in reversed(shards):
        write_shard(shard, TOKENIZER, "instruct")
    return TokenSet(tmp_path / "tokens", rows)


def test_examples_come_back_in_the_order_of_their_rows(written: TokenSet) -> None:
    want = [encode_example(TOKENIZER, row["question"], row["response"]) for row in ROWS]
    assert [(e.tokens.tolist(), e.loss_from) for e in written] == want
    assert written.lengths.tolist() == [len(e) for e in written]
    assert written[59].id == f"{written.rows}:60" and len(written) == 60
    counts = written.counts()
    assert counts["tokens"] == sum(len(ids) for ids, _ in want)
    assert counts["answer_tokens"] == sum(len(ids) - start for ids, start in want)
    whole = TokenSet(written.folder, written.rows, loss_on_question=True)
    assert {e.loss_from for e in whole} == {0} and whole.digest() != written.digest()
    with pytest.raises(IndexError):
        written[60]


def test_an_example_is_a_view_of_the_file(written: TokenSet) -> None:
    tokens = written[7].tokens
    assert not tokens.flags.owndata and not tokens.flags.writeable and tokens.dtype == np.int32


def test_a_damaged_token_is_named_when_it_is_read(written: TokenSet) -> None:
    path = sorted(written.folder.glob("*.bin"))[-1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # the last document's end token
    path.write_bytes(content)
    damaged = TokenSet(written.folder, written.rows)
    assert [len(damaged[i]) for i in range(59)] == written.lengths[:59].tolist()
    with pytest.raises(ValueError, match=rf"{path}: the tokens of .*rows\.jsonl:60 do not match their checksum: the file is damaged"):  # fmt: skip
        damaged[59]


@pytest.mark.parametrize("least", [1, 30, 200, 10**6])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n"])
def test_spans_divide_the_lines_of_a_file(least: int, end: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\n".join(f'{{"n": {10**n}}}' for n in range(20)) + end).encode())
    whole = list(numbered_rows(path, {"n": int}))
    parts = [s for s in spans(path, least) if s.line <= 20]
    assert [pair for span in parts for pair in numbered_rows(path, {"n": int}, span=span)] == whole
    assert len(whole) == 20 and (len(parts) == 1) == (least == 10**6)


def test_an_empty_file_has_no_shards(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"rows\.jsonl: expected at least one row, got an empty file"):  # fmt: skip
        shards_of(tmp_path / "rows.jsonl", tmp_path)
