"""Samples of the viewer, and their compact form in its page: one array per quantity over the tokens of all samples."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from phimini.model.io.json_files import array_text
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.training.batch import PackedBatch

QUANTITIES = {"weight": "loss weight", "logp": "log-prob", "advantage": "advantage"}
"""columns of a page, with their names; a page also has the position"""


@dataclass(frozen=True, slots=True)
class Text:
    """A document of a sample, with a value of each quantity per token: that of the prediction of this token."""

    name: str
    tokens: np.ndarray
    """(n,) int"""
    columns: Mapping[str, np.ndarray]
    """by names of QUANTITIES, (n,) float32; NaN where a token has no such value"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A unit of training: a packed row, an example, a pair or a rollout."""

    id: str
    place: int
    """its place in the order of the page"""
    texts: Sequence[Text]
    verdict: str = ""
    """"right" or "wrong"; "" for a unit without one verdict"""
    reason: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    """what the page says above the text"""

    @property
    def num_tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)


def texts_of(batch: PackedBatch, names: Sequence[str]) -> list[Text]:
    """Return the documents of a micro-batch as training sees them.

    A position's target, weight and other fields belong to the token that it predicts, the next one; the first token of a
    document is predicted by none. Of a batch without the field `weight` each target weighs 1.
    """
    targets = batch.targets_T.numpy()
    fields = {name: x.numpy() for name, x in batch.fields.items()}
    given = {
        "weight": fields.get("weight", targets >= 0),
        "logp": fields.get("old_logp"),
        "advantage": fields.get("advantage"),
    }
    texts = []
    for name, (start, end) in zip(names, pairwise(batch.cu_seqlens.tolist()), strict=True):
        trained = targets[start:end] >= 0
        last = targets[end - 1 : end][trained[-1:]]  # the input of no position
        tokens = np.concatenate([batch.tokens_T[start:end].numpy(), last])
        columns = {}
        for quantity, values in given.items():
            if values is not None:
                outside = 0 if quantity == "weight" else np.nan
                own = np.where(trained, values[start:end], outside)
                columns[quantity] = np.append(np.float32(outside), own)[: len(tokens)].astype(np.float32)  # fmt: skip
        texts.append(Text(name, tokens, columns))
    return texts


def within(samples: Iterable[Sample], most_tokens: int) -> list[Sample]:
    """Return the first samples up to so many tokens together, and one in any case, in the order of their places."""
    taken, tokens = [], 0
    for sample in samples:
        tokens += sample.num_tokens
        if taken and tokens > most_tokens:
            break
        taken.append(sample)
    return sorted(taken, key=lambda sample: sample.place)


def data_of(samples: Sequence[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the samples as JSON values: texts of the distinct tokens, and base64 of little-endian arrays.

    `tokens` are places in `texts`; document d has the tokens ends[d - 1] to ends[d], sample s the documents up to
    documents[s].
    """
    texts = [text for sample in samples for text in sample.texts]
    ids, places = np.unique(np.concatenate([t.tokens for t in texts]), return_inverse=True)
    columns = {
        quantity: array_text(np.concatenate([t.columns[quantity] for t in texts]).astype("<f4"))
        for quantity in QUANTITIES
        if any(quantity in t.columns for t in texts)
    }
    counted = lambda sizes: array_text(np.cumsum(list(sizes)).astype("<u4"))
    return {
        "texts": [tokenizer.decode([int(id)]) for id in ids],
        "ids": ids.tolist(),
        "tokens": array_text(places.astype("<u4")),
        "columns": columns,
        "names": [text.name for text in texts],
        "ends": counted(len(text.tokens) for text in texts),
        "documents": counted(len(sample.texts) for sample in samples),
        "samples": {
            name: [getattr(sample, name) for sample in samples]
            for name in ("id", "verdict", "reason")
        }
        | {"facts": [dict(sample.facts) for sample in samples]},
    }


def json_of(data: Any) -> Markup:
    """Return JSON for a script element: ASCII, and no "<" can end it."""
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
