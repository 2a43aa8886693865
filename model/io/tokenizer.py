"""Tokenizer over a Hugging Face `tokenizer.json`, and the training of the tiny preset's tokenizer.

Phi-4-mini ends a turn with `<|end|>` and a document with `<|endoftext|>`, which is also bos, pad and unk.
Because pad and eos are one id, a loss mask must never be made from token ids (see chat.py).
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from phimini.model.io.json_files import read_object, write_text

END = "<|end|>"
EOS = "<|endoftext|>"

# Phi-4-mini's control tokens: (text, special, strips white space to its right).
PHI4_TOKENS = (
    (EOS, True, False),
    ("<|endofprompt|>", True, False),
    ("<|assistant|>", True, True),
    (END, True, True),
    ("<|user|>", True, True),
    ("<|system|>", True, True),
    ("<|tool|>", False, False),
    ("<|/tool|>", False, False),
    ("<|tool_call|>", False, False),
    ("<|/tool_call|>", False, False),
    ("<|tool_response|>", False, False),
    ("<|tag|>", True, False),
)
NAMED_TOKENS: dict[str, str] = dict.fromkeys(
    ("bos_token", "eos_token", "pad_token", "unk_token"), EOS
)
"""of Phi-4-mini's tokenizer_config.json"""
# As shipped in tokenizer_config.json of microsoft/Phi-4-mini-instruct and microsoft/Phi-4-mini-reasoning.
TEMPLATES: dict[str, str] = {
    "instruct": (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
        "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + "
        "message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + "
        "message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "reasoning": (
        "{{ '<|system|>Your name is Phi, an AI math expert developed by Microsoft.' }}"
        "{% for message in messages %}{% if message['role'] == 'system' %} {{ message['content'] }}"
        "{% if 'tools' in message and message['tools'] is not none %}{{ '<|tool|>' + message['tools'] + "
        "'<|/tool|>' }}{% endif %}{% endif %}{% endfor %}{{ '<|end|>' }}{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}"
        "{% endif %}"
    ),
}
# Ordinary text to Phi-4-mini. In the tiny tokenizer each is one token, but not a special one, so decoding keeps it.
THINK_TOKENS = ("<think>", "</think>")
# The characters of the demo's problems and solutions; those of the training texts are added.
TINY_ALPHABET = (
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/%=(),.:;?!'\\{} \n"
)


SAVE_AGAIN = "save the folder's tokenizer again with transformers, which then writes all tokens into tokenizer.json"


class Tokenizer:
    """A loaded tokenizer, with the ids that transformers' `AutoTokenizer` gives with `add_special_tokens=False`.

    Special tokens in a text become their ids, and no token is added, as in transformers' `apply_chat_template`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, config: dict) -> None:
        # Left from the tokenizer's training. transformers applies them only if a call asks for it.
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.config = config
        """tokenizer_config.json as read"""
        named = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}  # fmt: skip
        named = {k: v for k, v in named.items() if k.endswith("_token") and isinstance(v, str)}
        own = named.get("eos_token")
        self.named_tokens = {"eos_token": EOS, **named}
        """control tokens by the names that chat templates use"""
        self.end_id = self._first_id(END, own)
        """ends a turn; in another model's vocabulary its `eos_token` does"""
        self.eos_id = self._first_id(EOS, own)
        self.stop_ids = (self.end_id, self.eos_id)
        """ids that end a generation, in the order of Phi-4-mini's generation_config.json"""
        added = inner.get_added_tokens_decoder().values()
        self.special_tokens = frozenset(t.content for t in added if t.special)
        """control tokens, which questions and answers must not contain"""
        self._added = re.compile("|".join(re.escape(t.content) for t in added))
        self._alphabet = _alphabet(inner)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Read tokenizer.json and, if present, tokenizer_config.json.

        Raises ValueError that names the file and the field if it is not a tokenizer, if a token is defined only in
        another file of the folder, or if a setting makes ids random or control tokens plain text.
        """
        path, config_path = (
            Path(directory) / n for n in ("tokenizer.json", "tokenizer_config.json")
        )
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected a directory with tokenizer.json")
        config = read_object(config_path) if config_path.is_file() else {}
        if (template := Path(directory) / "chat_template.jinja").is_file():  # as transformers does
            config["chat_template"] = template.read_text(encoding="utf-8")
        read_object(path)
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower class; its message is kept
            raise ValueError(f"{path}: not a tokenizer: {error!s:.200}") from error
        _check_settings(path, config_path, inner, config)
        _add_tokens_of(config_path, inner, config)
        _check_named_tokens(Path(directory), inner, config)
        return cls(inner, config)

    def save(self, directory: str | os.PathLike, *, chat_template: str | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json. A chat template replaces the loaded one."""
        directory = Path(directory)
        config = dict(self.config)
        if chat_template is not None:
            config["chat_template"] = chat_template
        for name, text in (
            ("tokenizer.json", self.inner.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"),
        ):
            write_text(directory / name, text)

    @property
    def chat_template(self) -> str:
        """The text of the chat template in tokenizer_config.json or chat_template.jinja. Raises ValueError without one."""
        text = self.config.get("chat_template")
        if not isinstance(text, str) or "{" not in text:
            raise ValueError(
                f"chat_template: expected the text of a chat template, here or in chat_template.jinja, got {text!r:.60}"
            )
        return text

    @property
    def vocab_size(self) -> int:
        """The largest id plus one; a model's embedding may have more rows."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises ValueError for a character that the vocabulary cannot encode; a byte-level one encodes all.
        """
        self.check(text)
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int] | np.ndarray, skip_special: bool = False) -> str:
        """Return the text of ids. `skip_special` drops control tokens; `<think>` and `</think>` are text and stay."""
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        return self.inner.decode(numbers, skip_special_tokens=skip_special)

    def _first_id(self, token: str, other: str | None) -> int:
        for each in (token, other):
            if each and (token_id := self.inner.token_to_id(each)) is not None:
                return token_id
        raise ValueError(
            f"tokenizer: expected a vocabulary with {token} or an eos_token in tokenizer_config.json, got {other!r:.60}"
        )

    def check(self, text: str) -> None:
        """Raise ValueError for a character that the vocabulary cannot encode."""
        if self._alphabet is None or self._alphabet.issuperset(text):
            return
        normalise = self.inner.normalizer.normalize_str if self.inner.normalizer else str
        plain = set(self._added.sub("", text)) - self._alphabet
        wrong = {c for c in plain if not self._alphabet.issuperset(normalise(c))}
        if wrong:
            c = min(wrong, key=text.index)
            raise ValueError(
                f"tokenizer: cannot encode {c!r} (U+{ord(c):04X}) at character {text.index(c)} of "
                f"{around(text, c)!r}; the vocabulary has no token for it"
            )


def around(text: str, part: str) -> str:
    """Return a short excerpt of `text` with its first `part`."""
    start = text.index(part)
    return text[max(0, start - 20) : start + len(part) + 20]


def _check_settings(
    path: Path, config_path: Path, inner: tokenizers.Tokenizer, config: dict
) -> None:
    if dropout := getattr(inner.model, "dropout", None):
        raise ValueError(
            f"{path}: model.dropout: expected none, got {dropout!r:.60}: a text would have other ids each time"
        )
    if config.get("split_special_tokens"):
        raise ValueError(
            f"{config_path}: split_special_tokens: expected false, got {config['split_special_tokens']!r:.60}: the "
            f"chat template's {END} would be read as plain text"
        )


def _add_tokens_of(path: Path, inner: tokenizers.Tokenizer, config: dict) -> None:
    """Let tokenizer_config.json override the added tokens, as transformers does."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        by_id = sorted(listed.items(), key=lambda item: int(item[0]))
        tokens = [AddedToken(**fields) for _, fields in by_id]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: added_tokens_decoder: expected an object of tokens by id, got {listed!r:.80}: {error}"
        ) from error
    there = {repr(token) for token in inner.get_added_tokens_decoder().values()}
    inner.add_tokens([token for token in tokens if repr(token) not in there])


def _check_named_tokens(directory: Path, inner: tokenizers.Tokenizer, config: dict) -> None:
    """Refuse a token that another file names and that is not among the added tokens of tokenizer.json.

    transformers would add it by rules that depend on its version, and every text that contains it would get other ids.
    """
    files = {"tokenizer_config.json": config}
    if "added_tokens_decoder" not in config:  # otherwise transformers ignores the other files
        if (path := directory / "special_tokens_map.json").is_file():
            files[path.name] = read_object(path)
        if (path := directory / "added_tokens.json").is_file():
            files[path.name] = {"additional_special_tokens": list(read_object(path))}
    there = {token.content for token in inner.get_added_tokens_decoder().values()}
    for name, content in files.items():
        for field, tokens in _named_tokens(directory / name, content).items():
            for token in tokens:
                if token not in there:
                    raise ValueError(
                        f"{directory / name}: {field}: expected one of tokenizer.json's added tokens, got {token!r:.60}; "
                        "load the folder with transformers and save it again, which writes all tokens into that file"
                    )


def _named_tokens(path: Path, config: dict) -> dict[str, list[str]]:
    """Return the texts of all special tokens that a JSON object names, by field."""
    fields = {
        key: [value]
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(key) or []
        fields[key] = list(value.values()) if isinstance(value, dict) else value
    texts: dict[str, list[str]] = {}
    for key, tokens in fields.items():
        try:
            texts[key] = [t["content"] if isinstance(t, dict) else str(t) for t in tokens]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: {key}: expected tokens, got {config[key]!r:.60}") from error
    return texts


def _alphabet(inner: tokenizers.Tokenizer) -> frozenset[str] | None:
    """Return the characters that a character-level BPE can encode; it silently drops all others.

    None for a vocabulary that can encode every byte.
    """
    description = json.loads(inner.to_str())
    pre_tokenizer = json.dumps(description.get("pre_tokenizer"))
    if '"ByteLevel"' in pre_tokenizer or description["model"].get("byte_fallback"):
        return None
    return frozenset(t for t in inner.get_vocab(with_added_tokens=False) if len(t) == 1)


def train_tiny_tokenizer(texts: Iterable[str], vocab_size: int = 256) -> Tokenizer:
    """Train a character-level BPE with Phi-4-mini's control tokens and chat template, for a model of a few hundred token ids.

    Each digit is one token, so numbers are spelled out. Words merge with the space before them. `\\boxed{` is never
    one token, so that the model must write the box of its answer.
    """
    markers = [t for t, _, _ in PHI4_TOKENS] + list(THINK_TOKENS)
    split = re.compile("|".join(map(re.escape, markers)))
    pieces = [piece for text in texts for piece in split.split(text) if piece]
    alphabet = sorted(set(TINY_ALPHABET).union(*pieces)) if pieces else sorted(TINY_ALPHABET)
    if len(alphabet) + len(markers) > vocab_size:
        raise ValueError(
            f"train_tiny_tokenizer: expected vocab_size of at least {len(alphabet) + len(markers)} "
            f"({len(alphabet)} characters and {len(markers)} control tokens), got {vocab_size}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+|[^A-Za-z\d]"), "isolated")
    inner.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(markers), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(pieces, trainer)
    for text, special, rstrip in PHI4_TOKENS:
        add = inner.add_special_tokens if special else inner.add_tokens
        add([AddedToken(text, special=special, rstrip=rstrip, normalized=False)])
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK_TOKENS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **NAMED_TOKENS,
        "chat_template": TEMPLATES["instruct"],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(inner, config)
