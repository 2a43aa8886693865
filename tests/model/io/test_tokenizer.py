"""The tiny tokenizer (lossless, single digits, Phi-4-mini's control tokens), and loading from a folder."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_cases import TEXTS, TINY, byte_level
from tokenizers import Tokenizer as Inner
from tokenizers import models

from phimini.model.io.tokenizer import (
    PHI4_TOKENS,
    TINY_ALPHABET,
    Tokenizer,
    train_tiny_tokenizer,
)


@pytest.mark.parametrize(
    "text",
    [*TEXTS[:3], " 17  +\n\n 25 ", "\\boxed{-3/4}", "", "a", "(1*2)%3; no! yes? A:B."],
)
def test_round_trip(text: str) -> None:
    assert TINY.decode(TINY.encode(text)) == text


@given(st.text(alphabet=TINY_ALPHABET, max_size=60))
def test_round_trip_of_any_demo_text(text: str) -> None:
    assert TINY.decode(TINY.encode(text)) == text


def test_the_alphabet_is_the_demos() -> None:
    needed = string.ascii_letters + string.digits + "+-*/%=(),.:;?!\\{} \n"
    assert set(needed) <= set(TINY_ALPHABET)


def test_digits_stand_alone_and_the_box_is_written() -> None:
    pieces = [TINY.decode([i]) for i in TINY.encode("so 1234 is \\boxed{56}")]
    assert [p for p in pieces if any(c in string.digits for c in p)] == list("123456")
    assert "\\" in pieces and "{" in pieces
    assert len(TINY.encode(TEXTS[2])) < len(TEXTS[2]) / 2  # words did merge


def test_control_tokens() -> None:
    added = TINY.inner.get_added_tokens_decoder()
    flags = {t.content: (t.special, t.rstrip) for t in added.values()}
    for text, special, rstrip in PHI4_TOKENS:
        assert flags[text] == (special, rstrip)
        assert TINY.encode(f"x{text}") == TINY.encode("x") + [TINY.inner.token_to_id(text)]
    assert flags["<think>"] == flags["</think>"] == (False, False)
    assert not any("boxed" in text for text in flags)
    assert TINY.stop_ids == (TINY.end_id, TINY.eos_id)
    assert TINY.decode([TINY.end_id, TINY.eos_id]) == "<|end|><|endoftext|>"
    # What follows a role token loses its leading white space, as with Phi-4-mini.
    assert TINY.encode("<|assistant|>\n x") == TINY.encode("<|assistant|>x")
    assert TINY.encode("<think>\n x") != TINY.encode("<think>x")


def test_skip_special_keeps_thinking() -> None:
    ids = TINY.encode("<|assistant|><think>1</think>2<|end|>")
    assert TINY.decode(ids, skip_special=True) == "<think>1</think>2"


@pytest.mark.parametrize("character", ["€", "\t", "é", "½"])
def test_a_character_outside_the_vocabulary_is_an_error(character: str) -> None:
    with pytest.raises(
        ValueError, match=f"cannot encode {character!r}.* at character 10 of '<|user|>1 "
    ):
        TINY.encode(f"<|user|>1 {character} 2")


def test_a_character_of_the_texts_joins_the_alphabet() -> None:
    tokenizer = train_tiny_tokenizer(["5 €"])
    assert tokenizer.decode(tokenizer.encode("1 €")) == "1 €"


def test_training_is_repeatable_and_bounded() -> None:
    again = train_tiny_tokenizer(TEXTS)
    assert again.inner.to_str() == TINY.inner.to_str()
    assert TINY.vocab_size <= 256
    small = train_tiny_tokenizer(TEXTS, vocab_size=110)
    assert small.vocab_size <= 110
    with pytest.raises(ValueError, match="characters and 14 control tokens\\), got 50"):
        train_tiny_tokenizer(TEXTS, vocab_size=50)


def test_save_and_load(tmp_path: Path) -> None:
    TINY.save(tmp_path, chat_template="{{ messages }}")
    loaded = Tokenizer.load(tmp_path)
    assert [loaded.encode(t) for t in TEXTS] == [TINY.encode(t) for t in TEXTS]
    assert (loaded.stop_ids, loaded.vocab_size) == (TINY.stop_ids, TINY.vocab_size)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["pad_token"] == "<|endoftext|>"
    assert config["chat_template"] == "{{ messages }}"
    loaded.save(tmp_path / "again")  # the template read is kept
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == config
    assert {p.name for p in tmp_path.iterdir()} == {
        "again",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_transformers_reads_it_the_same(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TINY.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS)["input_ids"] == [TINY.encode(t) for t in TEXTS]
    assert theirs.decode(TINY.encode(TEXTS[0])) == TEXTS[0]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (TINY.eos_id, TINY.eos_id)


def test_a_byte_level_vocabulary_writes_everything(tmp_path: Path) -> None:
    """A byte-level vocabulary, as in Phi-4-mini's tokenizer."""
    inner = byte_level(["<|endoftext|>", "<|end|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("5 € ½ 漢<|end|>")) == "5 € ½ 漢<|end|>"


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Tokenizer.load(tmp_path)
    Inner(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError,
        match=r"expected a vocabulary with <\|end\|> or an eos_token in tokenizer_config.json, got None",
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{}", "not a tokenizer: Model missing"),
        ("tokenizer.json", b"[]", "expected a JSON object, got list"),
        ("tokenizer.json", b"\xff", "not valid JSON"),
        ("tokenizer_config.json", b"null", "expected a JSON object, got NoneType"),
        ("tokenizer_config.json", b"\xff", "not valid JSON"),
    ],
)
def test_a_file_that_is_none_is_named(
    file: str, content: bytes, message: str, tmp_path: Path
) -> None:
    TINY.save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        Tokenizer.load(tmp_path)
