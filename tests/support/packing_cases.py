"""Best-fit decreasing in its plain form, one document at a time: the definition of `best_fit`."""

import bisect


def best_fit_of_lists(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return rows by best-fit decreasing, one document at a time."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[i], -1))
        space, row = free.pop(at) if at < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if space > lengths[i]:
            bisect.insort(free, (space - lengths[i], row))
    return rows
