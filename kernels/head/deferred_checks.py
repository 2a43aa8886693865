"""Bad values on a GPU, reported without waiting for it.

A check on the host would stop it until the GPU has caught up. Instead the first bad index and its value are
copied to the host in the background, and the first head op that finds them there raises. Meanwhile the row has no target:
its log-prob is -lse.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

_Message = Callable[[int, float], str]
_pending: deque[tuple[torch.cuda.Event, Tensor, _Message]] = deque()


def first_bad(bad_M: Tensor, value_M: Tensor) -> Tensor:
    """(2,) fp64, which holds every index and class exactly: the first bad row, -1 if there is none, and its value."""
    at_1 = bad_M.to(torch.int8).argmax()[None]  # one element: to index with a scalar waits for it
    index_1 = torch.where(bad_M.index_select(0, at_1), at_1, -1)
    return torch.cat([index_1.double(), value_M.index_select(0, at_1).double()])


def check_later(bad_M: Tensor, value_M: Tensor, message: _Message) -> None:
    """If any row is bad, a later `raise_pending` raises ValueError(message(index, value)) for the first."""
    found_2 = first_bad(bad_M, value_M)
    on_host_2 = torch.empty(2, dtype=torch.float64, pin_memory=True)
    on_host_2.copy_(found_2, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending.append((event, on_host_2, message))


def raise_pending(wait: bool = False) -> None:
    """Raise for the checks whose results have arrived; with `wait`, for all (before a run ends, in tests)."""
    while _pending:
        event, on_host_2, message = _pending[0]
        if wait:
            event.synchronize()
        if not event.query():
            return
        _pending.popleft()
        index, value = on_host_2.tolist()
        if index >= 0:
            raise ValueError(
                f"{message(int(index), value)} (found by the check of an earlier call)"
            )
