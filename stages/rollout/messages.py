"""Messages between the trainer and an engine's endpoints (`endpoints.py`): MessagePack, tokens and log-probs as arrays.

Decoding checks every field's type and makes plain values only, so a message can do no more than its endpoint says.
"""

from typing import Any, Literal

import msgspec
import numpy as np

from phimini.model.sampler import SamplingParams

PREFIX = "/phimini"
"""path of all endpoints"""
LEASE_HEADER = "x-phimini-lease"
"""header with the token of the trainer that may sync; see `Lease`"""

TOKENS = np.dtype("<i4")
LOGPROBS = np.dtype("<f4")


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """A request for one completion."""

    prompt: bytes
    """token ids as TOKENS"""
    params: SamplingParams
    seed: int


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """The tokens of one completion, or of a part of it if a sync aborted the request: 8 bytes each."""

    tokens: bytes
    logprobs: bytes
    finish_reason: Literal["stop", "length", "abort"]
    versions: list[tuple[int, int, int]]
    """spans: version, start, end"""


class Lease(msgspec.Struct, forbid_unknown_fields=True):
    """A request to be the one trainer that may sync. A second one of the same holder ends the first."""

    holder: str
    """the trainer's run: its folder"""


class State(msgspec.Struct, forbid_unknown_fields=True):
    """An engine and its policy."""

    vllm: str
    """vLLM's version"""
    config: dict[str, Any]
    settings: dict[str, Any]
    pid: int
    workers: list[int]
    version: int | None
    """version of the weights that may be sampled from; None: none, or mixed"""
    holder: str | None
    """holder of the lease"""


class Pulse(msgspec.Struct, forbid_unknown_fields=True):
    """A sign of life."""

    silent_s: float
    """seconds since the model's process last answered"""
    version: int | None


encode = msgspec.msgpack.encode


def as_bytes(values: Any, dtype: np.dtype) -> bytes:
    """Return a list or array of numbers as the bytes of `dtype`."""
    return np.asarray(values, dtype).tobytes()
