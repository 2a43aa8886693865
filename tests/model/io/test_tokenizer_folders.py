"""Tokenizer folders of other programs: the ids of transformers' `AutoTokenizer`, or an error with file and field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_cases import TEXTS, TINY
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from phimini.model.io.chat import TEMPLATES, encode_example, encode_prompt
from phimini.model.io.tokenizer import END, EOS, PHI4_TOKENS, Tokenizer

QUESTION, ANSWER = "Why is 1235 odd?\n Don't guess.", " It ends with 5: \\boxed{5}"
ASKED = [
    *TEXTS[:3],
    QUESTION,
    ANSWER,
    " x  yz\n\n",
    "a<|user|>  b<|end|>\nc<|tool|> d<|tag|> e",
    "",
]


def byte_level() -> Inner:
    """Return a tokenizer like Phi-4-mini's: bytes, its split, its control tokens."""
    inner = Inner(models.BPE())
    split = Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+|.")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([QUESTION, ANSWER] * 4, trainer)
    for text, special, rstrip in PHI4_TOKENS:
        add = inner.add_special_tokens if special else inner.add_tokens
        add([AddedToken(text, special=special, rstrip=rstrip, normalized=False)])
    return inner


NAMES = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), EOS)


def write(folder: Path, inner: Inner, **files: dict[str, Any]) -> Path:
    """Write a base folder, with the wrong tokenizer class that microsoft's folder names."""
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", **NAMES} | files.pop("tokenizer_config", {})
    for name, content in (files | {"tokenizer_config": config, "config": {"model_type": "phi3"}}).items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": True} | plain | flags


def set_(**attributes: Any) -> Callable[[Inner], None]:
    def edit(inner: Inner) -> None:
        for name, value in attributes.items():
            setattr(inner, name, value)

    return edit


def post_processor(inner: Inner) -> None:
    inner.post_processor = TemplateProcessing(
        single=f"{EOS} $A {END}", special_tokens=[(t, inner.token_to_id(t)) for t in (EOS, END)]
    )


def odd_tokens(inner: Inner) -> None:
    inner.add_tokens([AddedToken("odd", single_word=True), AddedToken("gue", normalized=True)])
    inner.add_special_tokens([AddedToken("<x>", lstrip=True)])


BASE = byte_level()
USER = str(BASE.token_to_id("<|user|>"))
LISTED = {
    str(i): token(t.content, rstrip=t.rstrip, special=t.special)
    for i, t in BASE.get_added_tokens_decoder().items()
}
UNUSED = str(BASE.get_vocab_size())
# Files beside an edited tokenizer.json.
SAME: dict[str, tuple[Callable[[Inner], Any], dict[str, dict]]] = {
    "as it is": (set_(), {}),
    "truncation": (lambda i: i.enable_truncation(6), {}),
    "truncation from the left": (lambda i: i.enable_truncation(6, stride=2, direction="left"), {}),
    "truncation of a second text": (lambda i: i.enable_truncation(6, strategy="only_second"), {}),
    "padding to 64": (lambda i: i.enable_padding(length=64, pad_id=3), {}),
    "padding to a multiple": (lambda i: i.enable_padding(pad_to_multiple_of=8, direction="left"), {}),
    "a post-processor that adds tokens": (post_processor, {}),
    "lower case": (set_(normalizer=normalizers.Lowercase()), {}),
    "NFKC and a prefix": (
        set_(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("_")])), {},
    ),
    "a prefix space": (set_(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), {}),
    "other added tokens": (odd_tokens, {}),
    "bos and eos asked for": (set_(), {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}}),
    "a prefix space asked for": (set_(), {"tokenizer_config": {"add_prefix_space": True}}),
    "lengths and sides": (
        set_(),
        {"tokenizer_config": {"model_max_length": 5, "max_length": 5, "truncation": True,
                              "truncation_side": "left", "padding": "max_length", "padding_side": "left"}},
    ),
    "tokens listed": (set_(), {"tokenizer_config": {"added_tokens_decoder": LISTED}}),
    "a token listed with other flags": (
        set_(), {"tokenizer_config": {"added_tokens_decoder": {USER: token("<|user|>", lstrip=True)}}},
    ),
    "a token listed that tokenizer.json has not": (
        set_(), {"tokenizer_config": {"added_tokens_decoder": {UNUSED: token("Don't", special=False)}}},
    ),
    "a token listed that is an ordinary one": (
        set_(), {"tokenizer_config": {"added_tokens_decoder": {"5": token("H")}}},
    ),
    "files of old versions": (
        set_(), {"special_tokens_map": NAMES, "added_tokens": {EOS: BASE.token_to_id(EOS)}},
    ),
    "files of old versions that are not read": (
        set_(),
        {"tokenizer_config": {"added_tokens_decoder": LISTED},
         "special_tokens_map": {"cls_token": "Don't"}, "added_tokens": {"guess": 1}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "files"), SAME.values(), ids=SAME)
def test_ids_are_those_of_transformers(
    edit: Callable[[Inner], Any], files: dict[str, dict], tmp_path: Path
) -> None:
    inner = byte_level()
    edit(inner)
    folder = write(tmp_path / "base", inner, **files)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    want = [theirs(text, add_special_tokens=False)["input_ids"] for text in ASKED]
    assert [ours.encode(text) for text in ASKED] == want
    if inner.post_processor is None:  # a plain call obeys that, and a chat template does not
        assert theirs(ASKED)["input_ids"] == want
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        chat_template=TEMPLATES["instruct"],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert encode_prompt(ours, QUESTION) == prompt
    # And of what we write of it, for us and for transformers.
    ours.save(tmp_path / "again", chat_template=TEMPLATES["instruct"])
    (tmp_path / "again" / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    ours, theirs = Tokenizer.load(tmp_path / "again"), AutoTokenizer.from_pretrained(tmp_path / "again")  # fmt: skip
    assert [ours.encode(text) for text in ASKED] == want
    assert [theirs(text, add_special_tokens=False)["input_ids"] for text in ASKED] == want


@pytest.mark.parametrize("name", ["truncation", "padding to 64", "padding to a multiple"])
def test_an_example_keeps_its_prompt_and_its_end(name: str, tmp_path: Path) -> None:
    """With the tiny tokenizer: truncated or appended tokens are those with loss."""
    question, answer = "Is 1235 odd? Tom, buy 3 boxes before you answer.", "5 is odd: \\boxed{1}"
    want = encode_example(TINY, question, answer)
    inner = Inner.from_str(TINY.inner.to_str())
    SAME[name][0](inner)
    got = encode_example(Tokenizer.load(write(tmp_path, inner)), question, answer)
    assert got == want and got[0][-2:] == [TINY.end_id, TINY.eos_id]


def test_a_normalizer_may_bring_a_text_into_a_character_vocabulary(tmp_path: Path) -> None:
    inner = Inner.from_str(TINY.inner.to_str())
    inner.normalizer = normalizers.NFKC()
    folder = write(tmp_path, inner)
    text = "x\u00b2 = \uff14"  # superscript 2, full-width 4
    want = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert Tokenizer.load(folder).encode(text) == want == TINY.encode("x2 = 4")
    with pytest.raises(ValueError, match="cannot encode '\u20ac'"):
        Tokenizer.load(folder).encode("4 \u20ac")


ADDED = "expected one of tokenizer.json's added tokens, got"
REFUSED: dict[str, tuple[Callable[[Inner], Any], dict[str, dict], str]] = {
    "dropout": (lambda i: setattr(i.model, "dropout", 0.1), {}, r"tokenizer.json: model.dropout: expected none, got 0\.1"),
    "control tokens as text": (
        set_(), {"tokenizer_config": {"split_special_tokens": True}}, "tokenizer_config.json: split_special_tokens: expected false, got True",
    ),
    "a new pad token": (set_(), {"tokenizer_config": {"pad_token": "<pad>"}}, f"tokenizer_config.json: pad_token: {ADDED} '<pad>'"),
    "an ordinary pad token": (set_(), {"tokenizer_config": {"pad_token": "a"}}, f"tokenizer_config.json: pad_token: {ADDED} 'a'"),
    "a token of its own kind": (set_(), {"tokenizer_config": {"image_token": token("<i>")}}, f"tokenizer_config.json: image_token: {ADDED} '<i>'"),
    "more special tokens": (
        set_(), {"tokenizer_config": {"additional_special_tokens": ["<|user|>", "<s>"]}}, f"tokenizer_config.json: additional_special_tokens: {ADDED} '<s>'",
    ),
    "extra special tokens by name": (
        set_(), {"tokenizer_config": {"extra_special_tokens": {"a_token": "<s>"}}}, f"tokenizer_config.json: extra_special_tokens: {ADDED} '<s>'",
    ),
    "special_tokens_map.json": (set_(), {"special_tokens_map": {"cls_token": token("<s>")}}, f"special_tokens_map.json: cls_token: {ADDED} '<s>'"),
    "added_tokens.json": (set_(), {"added_tokens": {"<s>": 1}}, f"added_tokens.json: additional_special_tokens: {ADDED} '<s>'"),
    "a list of no tokens": (
        set_(), {"tokenizer_config": {"added_tokens_decoder": {"5": "a"}}}, "tokenizer_config.json: added_tokens_decoder: expected an object of tokens by id",
    ),
    "a list without ids": (
        set_(), {"tokenizer_config": {"added_tokens_decoder": [1]}}, "tokenizer_config.json: added_tokens_decoder: expected an object of tokens by id",
    ),
    "names that are none": (set_(), {"tokenizer_config": {"extra_special_tokens": 5}}, "tokenizer_config.json: extra_special_tokens: expected tokens, got 5"),
    "a token without text": (set_(), {"tokenizer_config": {"eos_token": {}}}, "tokenizer_config.json: eos_token: expected tokens, got {}"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "files", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_give_other_ids_is_refused(
    edit: Callable[[Inner], Any], files: dict[str, dict], message: str, tmp_path: Path
) -> None:
    inner = byte_level()
    edit(inner)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(write(tmp_path, inner, **files))
    assert str(tmp_path) in str(error.value)
