"""Output streams that never end a run: not for a terminal that is not UTF-8, a closed pipe, or a full disk."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingStream:
    """A text stream that never raises. A character that its encoding lacks becomes `?`; after a failed write it drops text.

    `lost` is the error of the failed write. `told` gets a line about it, and the descriptor then leads to the null device:
    otherwise the interpreter would fail at its end when it flushes the buffer.
    """

    def __init__(self, stream: TextIO, name: str, told: TextIO | None = None) -> None:
        self._stream, self._name, self._told = stream, name, told
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`, or drop it after a failure; return its length."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; an error counts as a failed write."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        if self._told is not None:
            message = f"phimini: {self._name}: {error.strerror}; what follows is not shown"
            print(message, file=self._told, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Replace standard output and error by `LastingStream`s; yield the first.

    A stream that was closed at the start becomes the null device.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would get its number, and what a library prints would go into that.
            os.open(os.devnull, os.O_RDWR)
    with contextlib.ExitStack() as stack:
        null = lambda: stack.enter_context(open(os.devnull, "w"))
        error = LastingStream(sys.stderr or null(), "standard error")
        output = LastingStream(sys.stdout or null(), "standard output", told=error)  # pyright: ignore[reportArgumentType]
        stack.enter_context(contextlib.redirect_stdout(output))  # pyright: ignore[reportArgumentType]
        stack.enter_context(contextlib.redirect_stderr(error))  # pyright: ignore[reportArgumentType]
        try:
            yield output
        finally:
            output.flush()
            error.flush()
