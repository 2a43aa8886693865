"""A model behind an OpenAI-compatible endpoint: answers to questions, each asked for until there is one, and once.

The teacher of `distill`, and the judge and the labels of `clean`.

An answer is a line of the journal as soon as it arrives. A run that was killed, at whatever point, reads the journal and asks
for what is missing; at the end the answers are written in the order of the questions. The journal is flushed to the
kernel, not to the disk: a power cut may cost the last answers, which are then asked for again.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import aiohttp
import msgspec
import numpy as np

from phimini.model.io.json_files import Row, atomic_file, dump
from phimini.model.io.tokenizer import PHI4_TOKENS
from phimini.stages.config.data_steps import TeacherConfig
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import text_hash

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0
"""between two attempts: doubled after each, and less by chance so that requests spread"""
MAX_RETRY_AFTER_S = 600.0
REPORT_S = 30.0
ASK_AGAIN = {408, 409, 425, 429}
"""statuses below 500 of an endpoint that may answer later"""
_CONTROL = [text for text, is_special, _ in PHI4_TOKENS if is_special]


class Message(msgspec.Struct):
    """The text of a choice; thoughts may be apart, under the names of DeepSeek or of vLLM."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def text(self) -> str:
        """Return thoughts and answer in one text."""
        thoughts, answer = self.reasoning_content or self.reasoning or "", self.content or ""
        return f"<think>\n{thoughts.strip()}\n</think>\n\n{answer.strip()}" if thoughts else answer


class Choice(msgspec.Struct):
    """One answer."""

    message: Message
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """Tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Reply(msgspec.Struct):
    """The body of an endpoint's answer."""

    choices: list[Choice]
    usage: Usage | None = None


class Fault(Exception):
    """A failed attempt: its kind, and for how long the endpoint wants no request."""

    def __init__(self, kind: str, wait_s: float = 0.0) -> None:
        super().__init__(kind)
        self.wait_s = wait_s


class Journal:
    """The answers so far, by question and number, in a file that is appended to; 16 bytes of memory each."""

    def __init__(self, path: Path) -> None:
        """Read what an interrupted run left; a torn last line is cut off."""
        self.path = path
        keys, starts = array("q"), array("q")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab+")
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: malformed line at byte {end}: {error}") from error
            keys.append(_key(row["question"], row["id"]))
            starts.append(end)
            end += len(line)
        self._file.truncate(end)
        order = np.argsort(np.array(keys, np.int64))
        self._found = np.array(keys, np.int64)[order], np.array(starts, np.int64)[order]

    def add(self, row: Row) -> None:
        """Append an answer."""
        self._file.write(f"{dump(row, f'{self.path}')}\n".encode())
        self._file.flush()

    def start_of(self, question: str, id: str) -> int | None:
        """Return the place of an answer that was there when the journal was opened."""
        keys, starts = self._found
        place = int(np.searchsorted(keys, key := _key(question, id)))
        return int(starts[place]) if place < len(keys) and keys[place] == key else None

    def line(self, start: int) -> bytes:
        self._file.seek(start)
        return self._file.readline()

    def close(self) -> None:
        self._file.close()


def _key(question: str, id: str) -> int:
    return int.from_bytes(text_hash(question, id), "little", signed=True)


class Task(NamedTuple):
    """A question, and the ids of its answers that are missing."""

    question: Row
    missing: dict[str, int]
    """id to number"""


class Teacher:
    """Requests to the endpoint, and the counts of what came back."""

    def __init__(self, config: TeacherConfig, seed: int, journal: Journal, field: str) -> None:
        """field: the setting that errors name; its first word begins the lines that are printed."""
        self.config, self.field = config, field
        self.counts: Counter[str] = Counter()
        self._seed, self._journal = seed, journal
        self._key = os.environ.get(self.config.key_variable, "")
        self._paused_until = 0.0
        self._stopping = False
        self._reported = time.monotonic()

    async def answer_all(self, tasks: Iterator[Task]) -> None:
        """Ask for every missing answer, `concurrency` questions at a time.

        Raises ValueError if the endpoint refuses a request, ConnectionError after `attempts` failures of one question in a row;
        before that the requests under way, which are paid for, end.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=self.config.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)

        async def work() -> None:
            try:
                for task in tasks:
                    await self._answer(session, task)
                    if self._stopping:
                        return
            except Exception as error:
                # Raised again; the other workers end first, because their requests are paid for.
                if not self._stopping:
                    self._print(f"stopping when the requests under way have ended: {error}")
                self._stopping = True
                raise

        async with aiohttp.ClientSession(
            headers=headers, timeout=timeout, connector=connector
        ) as session:
            workers = (work() for _ in range(self.config.concurrency))
            ends = await asyncio.gather(*workers, return_exceptions=True)
        for failed in filter(None, ends):
            raise failed

    async def _answer(self, session: aiohttp.ClientSession, task: Task) -> None:
        """Ask until every answer of a question is in the journal."""
        failed, spent = 0, Usage()
        while task.missing and not self._stopping:
            ids = list(task.missing)[: self.config.per_request]
            await asyncio.sleep(self._paused_until - time.monotonic())
            try:
                seed = derive(self._seed, "teacher", ids[0], failed) % 2**31
                reply = await self._request(session, task.question, len(ids), seed)
                spent = _sum(spent, reply.usage or Usage())
                written = self._accept(task, ids, reply, seed, spent, last=failed + 1 == self.config.attempts)  # fmt: skip
                failed, spent = 0, Usage()
                self.counts["answers"] += written
            except Fault as fault:
                failed += 1
                self.counts[str(fault)] += 1
                if failed == self.config.attempts:
                    raise ConnectionError(
                        f"{self.field}: {self.config.url}: {failed} attempts at the question {task.question['id']!r:.60} "
                        f"failed, the last one: {fault}; the answers so far are kept"
                    ) from None
                wait = random.uniform(0.5, 1) * min(FIRST_WAIT_S * 2 ** (failed - 1), MAX_WAIT_S)
                if fault.wait_s:
                    until = time.monotonic() + min(fault.wait_s, MAX_RETRY_AFTER_S)
                    self._paused_until = max(self._paused_until, until)
                await asyncio.sleep(wait)
            self._report()

    def _accept(
        self, task: Task, ids: list[str], reply: Reply, seed: int, spent: Usage, *, last: bool
    ) -> int:
        """Write the usable answers of a reply to the journal; return their number. Raises Fault without any.

        At the last attempt an empty answer is kept, as one that was cut off: the endpoint has no other.
        """
        texts = [(choice.message.text(), choice.finish_reason) for choice in reply.choices]
        usable = [(text, end) for text, end in texts if text.strip() and not _has_control(text)]
        if not usable and not last:
            kind = "a control token" if any(text.strip() for text, _ in texts) else "empty text"
            raise Fault(kind if texts else "no choices")
        usable = usable or [("", "length")] * len(ids)
        self.counts["surplus answers"] += max(len(usable) - len(ids), 0)
        taken = list(zip(ids, usable, strict=False))
        for id, (text, end) in taken:
            self.counts["cut off"] += end != "stop"
            number = task.missing.pop(id)
            self._journal.add(self._row(task.question, id, number, text, end, seed, spent))
            self._spend(spent)
            spent = Usage()
        return len(taken)

    def _row(
        self, question: Row, id: str, number: int, text: str, end: str | None, seed: int, spent: Usage
    ) -> Row:  # fmt: skip
        config = self.config
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens, "seed": seed}  # fmt: skip
        return (
            question
            | {"id": id, "problem_id": question["id"], "response": text, "teacher": config.model, "sampling": sampling}
            | {"finish_reason": "stop" if end == "stop" else "length"}
            | msgspec.to_builtins(spent)
        )  # fmt: skip

    async def _request(
        self, session: aiohttp.ClientSession, question: Row, number: int, seed: int
    ) -> Reply:
        """Return the endpoint's reply to one question. Raises Fault if it may answer later, ValueError if it refuses."""
        config = self.config
        asked = "\n".join(filter(None, [config.instruction, question["question"]]))
        body = {
            "model": config.model, "messages": [{"role": "user", "content": asked}], "n": number, "seed": seed,
            "temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens,
        }  # fmt: skip
        self.counts["requests"] += 1
        try:
            async with session.post(
                f"{config.url.rstrip('/')}/chat/completions", json=body, allow_redirects=False
            ) as response:
                data = await response.read()
        except TimeoutError:
            raise Fault(f"no answer within {config.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(type(error).__name__) from error
        if response.status in ASK_AGAIN or response.status >= 500:
            raise Fault(f"HTTP {response.status}", _seconds(response.headers.get("Retry-After")))
        if response.status != 200:
            said = data[:300].decode(errors="replace")
            said = said.replace(self._key, "***") if self._key else said
            raise ValueError(
                f"{self.field}: {config.url} refuses the question {question['id']!r:.60}: HTTP {response.status}: {said}"
            )
        try:
            return msgspec.json.decode(data, type=Reply)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Fault("malformed reply") from None

    def _spend(self, usage: Usage) -> None:
        self.counts["prompt tokens"] += usage.prompt_tokens
        self.counts["answer tokens"] += usage.completion_tokens

    def note(self, row: Row) -> None:
        """Count an answer of an earlier run."""
        self.counts["answers before"] += 1
        self.counts["cut off"] += row["finish_reason"] != "stop"
        self._spend(Usage(row["prompt_tokens"], row["completion_tokens"]))

    def described(self) -> str:
        """Return a line with all counts and the cost."""
        prices = {"prompt tokens": self.config.prompt_price, "answer tokens": self.config.answer_price}  # fmt: skip
        cost = sum(self.counts[name] * price / 1e6 for name, price in prices.items())
        numbers = [f"{name} {count:,}" for name, count in sorted(self.counts.items()) if count]
        return f"{self.config.model}: {', '.join(numbers)}, cost {cost:,.2f}"

    def _report(self) -> None:
        if time.monotonic() - self._reported > REPORT_S:
            self._reported = time.monotonic()
            self.print_counts()

    def print_counts(self) -> None:
        self._print(self.described())

    def _print(self, text: str) -> None:
        print(f"{self.field.partition('.')[0]}: {text}", flush=True)


def ask(
    config: TeacherConfig,
    seed: int,
    questions: Callable[[], Iterable[Row]],
    path: Path,
    *,
    copies: int = 1,
    field: str,
) -> None:
    """Write `copies` answers to each question into `path`, in the order of the questions, and print the counts.

    questions: called twice. field: the setting that errors name. Raises as `Teacher.answer_all`; what has arrived by then is beside `path`, in a journal.
    """
    journal = Journal(path.with_suffix(".journal"))
    teacher = Teacher(config, seed, journal, field)
    ids = lambda question: {f"{question['id']}/{k}": k for k in range(copies)}

    def tasks() -> Iterator[Task]:
        for question in questions():
            missing = {}
            for id, number in ids(question).items():
                start = journal.start_of(question["question"], id)
                if start is None:
                    missing[id] = number
                else:
                    teacher.note(json.loads(journal.line(start)))
            if missing:
                yield Task(question, missing)

    try:
        asyncio.run(teacher.answer_all(tasks()))
    finally:
        journal.close()
        teacher.print_counts()
    whole = Journal(journal.path)
    with atomic_file(path) as file:
        for question in questions():
            for id in ids(question):
                start = whole.start_of(question["question"], id)
                assert start is not None, f"{journal.path} has no answer {id}"
                file.write(whole.line(start))
    whole.close()


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(one.prompt_tokens + other.prompt_tokens, one.completion_tokens + other.completion_tokens)  # fmt: skip


def _has_control(text: str) -> bool:
    """Return True for a text with a control token of the model that is trained, which could not be encoded as text."""
    return any(token in text for token in _CONTROL)


def _seconds(header: str | None) -> float:
    """Return the seconds of a Retry-After header: a number or a date; 0 for any other text."""
    try:
        return float(header or 0)
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header or "").timestamp() - time.time())
    except ValueError:
        return 0.0
