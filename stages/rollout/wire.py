"""Messages between trainer and engine processes: JSON over TCP, each after its length in 4 bytes.

    trainer -> engine   {"id": 7, "op": "generate", ...}
    engine -> trainer   {"id": 7, ...} or {"id": 7, "error": "..."}, in any order
    engine -> trainer   {"beat": 12} every few seconds while its model answers

Nothing is unpickled, so a message can do no more than the ops below say.
"""

import asyncio
import json
import socket
import struct
from typing import Any

MAX_BYTES = 1 << 28
Message = dict[str, Any]


def encode(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return struct.pack("!I", len(body)) + body


async def read(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None when the other side is gone."""
    try:
        (length,) = struct.unpack("!I", await reader.readexactly(4))
        return _decode(length, await reader.readexactly(_checked(length)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive(connection: socket.socket) -> Message | None:
    """As `read`, blocking."""
    header = _exactly(connection, 4)
    if header is None:
        return None
    (length,) = struct.unpack("!I", header)
    body = _exactly(connection, _checked(length))
    return None if body is None else _decode(length, body)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> (host, port). ValueError for anything else."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"rollout.addresses: expected host:port, got {address!r}")
    return host, int(port)


def _checked(length: int) -> int:
    if length > MAX_BYTES:
        raise ConnectionError(f"the other side does not speak this protocol: {length} bytes")
    return length


def _decode(length: int, body: bytes) -> Message:
    assert len(body) == length, "read exactly"
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ConnectionError(f"the other side does not speak this protocol: {error}") from error
    if not isinstance(message, dict):
        raise ConnectionError(f"the other side does not speak this protocol: {message!r:.40}")
    return message


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        try:
            part = connection.recv(min(count, 1 << 20))
        except OSError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
