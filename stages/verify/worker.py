r"""Worker process that compares answers: one JSON line [response, answer, seconds] in, one outcome out.

Its argument names the rules, a module of this room with `are_equal` and `warm_up`. Each process has one of them, because
`expressions` replaces parts of math-verify.

sympy can spend hours and gigabytes on one line, so a forked child does the comparison, and the kernel ends the child
at its limit of processor time. The parent keeps sympy loaded and forks the next child in milliseconds, so that an
answer that exceeds the limit costs that limit and no restart.
"""

import importlib
import json
import logging
import os
import resource
import signal
import sys
import traceback
from typing import Any, BinaryIO

_MEMORY_BYTES = 2 << 30


class Child:
    """A forked process that answers one question at a time until it is ended."""

    def __init__(self, rules: Any) -> None:
        asked, self.questions = os.pipe()
        self.replies, replying = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.questions)
            os.close(self.replies)
            try:
                _answer(rules, os.fdopen(asked, "rb"), os.fdopen(replying, "wb", buffering=0))
            except BaseException:  # a fork must never return into its parent's code
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(asked)
        os.close(replying)

    def ask(self, question: bytes) -> bytes | None:
        """Return the child's reply; None if the child ended before it replied."""
        try:
            os.write(self.questions, question)
        except BrokenPipeError:
            return None
        reply = b""
        while not reply.endswith(b"\n"):
            piece = os.read(self.replies, 4096)
            if not piece:
                return None
            reply += piece
        return reply

    def close(self) -> int:
        """Wait for the end of the child; return the signal that ended it, or 0."""
        os.close(self.questions)
        os.close(self.replies)
        return os.waitpid(self.pid, 0)[1] & 0x7F


def _answer(rules: Any, questions: BinaryIO, replies: BinaryIO) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in questions:
        response, answer, limit_seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_seconds)
        replies.write(json.dumps(_outcome(rules, response, answer)).encode() + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)


def _outcome(rules: Any, response: str, answer: str) -> str:
    try:
        equal = rules.are_equal(response, answer)
    except (MemoryError, RecursionError, OverflowError):
        return "too large"
    except (ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError):
        return "unreadable"
    return "unreadable" if equal is None else "equal" if equal else "different"


def main() -> None:
    logging.disable()  # math-verify warns that its own time limit is off; the kernel's limit replaces it
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # other output must not look like a reply
    # Parser and sympy load lazily: load them here, so that every child inherits them.
    rules = importlib.import_module(f"phimini.stages.verify.{sys.argv[1]}")
    rules.warm_up()
    child = Child(rules)
    replies.write(b'"ready"\n')
    for line in iter(sys.stdin.buffer.readline, b""):
        reply = child.ask(line)
        for _ in range(2):
            if reply is not None:
                break
            signal_number = child.close()
            child = Child(rules)
            if signal_number == signal.SIGPROF:
                reply = b'"timed out"\n'
            else:  # killed from outside before the question, or crashed by it: a second try distinguishes the two
                reply = child.ask(line)
        replies.write(b'"too large"\n' if reply is None else reply)
    child.close()


if __name__ == "__main__":
    main()
