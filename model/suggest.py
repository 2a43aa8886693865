"""What to say of a word that a person gave and nothing knows: the one that it resembles, and all that there are"""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean sft? expected one of midtrain, sft`; the question only if one of `known` is similar."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}expected one of {', '.join(names)}"
