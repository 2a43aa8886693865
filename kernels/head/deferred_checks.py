"""Bad values on a GPU, reported without waiting for it.

A check on the host would stop the host until the GPU has caught up. Instead the first bad index and its value are
copied to the host in the background, and the first head op that finds them there raises. Meanwhile the row has no
target: its log-prob is -lse.
"""

from collections import deque

import torch
from torch import Tensor

pending: deque[tuple[torch.cuda.Event, Tensor, str]] = deque()
"""Checks whose results are on their way: when they arrive, where, and the message."""


def first_bad(bad_M: Tensor, value_M: Tensor) -> Tensor:
    """Return (2,) fp64: the index of the first bad row (-1 without one) and its value, both exact."""
    at_1 = bad_M.to(torch.int8).argmax()[None]  # one element: to index with a scalar waits for it
    index_1 = torch.where(bad_M.index_select(0, at_1), at_1, -1)
    return torch.cat([index_1.double(), value_M.index_select(0, at_1).double()])


def check_later(bad_M: Tensor, value_M: Tensor, message: str) -> None:
    """Note a check: if a row is bad, a later `raise_pending` raises ValueError(message.format(index, value))."""
    if value_M.numel() == 0:
        return
    send_home(first_bad(bad_M, value_M), message)


def send_home(found_2: Tensor, message: str) -> None:
    """Copy a check's result to the host in the background. A traced or fake result never arrives."""
    if not found_2.is_cuda:
        return
    on_host_2 = torch.empty(2, dtype=torch.float64, pin_memory=True)
    on_host_2.copy_(found_2, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    pending.append((event, on_host_2, message))


def raise_pending(wait: bool = False) -> None:
    """Raise for the checks whose results have arrived; with `wait`, for all (before a run ends, in tests)."""
    while pending:
        event, on_host_2, message = pending[0]
        if wait:
            event.synchronize()
        if not event.query():
            return
        pending.popleft()
        index, value = on_host_2.tolist()
        if index >= 0:
            raise ValueError(
                f"{message.format(int(index), value)} (found by the check of an earlier call)"
            )
