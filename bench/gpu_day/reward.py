"""The reward of the GPU day's short recipe, whose model is too weak for right answers."""


def even_length(question: str, answer: str, response: str, finish_reason: str) -> float:
    """Return 1 for an answer of even length, else -1."""
    return 1.0 if len(response) % 2 == 0 else -1.0
