"""Suggestions for unknown names: "did you mean ...?"."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `did you mean sft? expected one of midtrain, sft`, or its second half if no known name is similar."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}expected one of {', '.join(names)}"
