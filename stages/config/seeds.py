"""Seeds by name: every random choice of a run has its own stream, so adding one moves no other."""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of run `seed`; equal inputs give equal seeds everywhere."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
