"""Scored rollouts: the journal that keeps their answers while a step samples, and their way to the ranks that train.

Every rank has the facts about every rollout. Its tokens and log-probs, 8 bytes a token, are on the rank that sampled
it, and go from there to the ranks of the replica that trains on it.
"""

import secrets
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from phimini.kernels import checksums
from phimini.model.config import ModelConfig
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World, on_every, on_main
from phimini.parallel.training.batch import DivergedError, digest
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.packing import flops_of, shares
from phimini.stages.rollout.engine import Arrived, First, Sampled, Span
from phimini.stages.rollout.engine import Sampler as EngineSampler
from phimini.stages.run.progress import StepProgress
from phimini.stages.verify.scorer import Answered, Score, Scorer, Second

SPAN = pa.struct(
    [("version", pa.int32()), ("start", pa.int32()), ("end", pa.int32()), ("weights", pa.int64())]
)
ANSWER = pa.schema(
    [
        ("request", pa.int64()), ("finish_reason", pa.string()), ("versions", pa.list_(SPAN)), ("checksum", pa.int64()),
        ("tokens", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float32())),
    ]
)  # fmt: skip
"""columns of an answer in the journal and in a step's table; see `rollout_log.py`"""
FILES = "[0-9][0-9][0-9][0-9][0-9][0-9].*"
"""pattern of the names of both, with the step's number counted from 1"""


class Facts(NamedTuple):
    """The facts about one answer that every rank has; its tokens and log-probs are on the rank `holder`."""

    score: float
    reason: str | None
    """the verifier's, for the score"""
    length: int
    """tokens"""
    finish_reason: str
    versions: tuple[Span, ...]
    checksum: int
    """of tokens and log-probs"""
    holder: int
    second: Second | None = None
    """verdict of the second check; None if that was not asked"""


def facts_of(completion: Sampled, score: Score, holder: int, second: Second | None = None) -> Facts:
    """Return the facts about a completion that is here, on the rank `holder`."""
    c, checksum = completion, checksum_of(completion)
    return Facts(*score, len(c.tokens), c.finish_reason, c.versions, checksum, holder, second)


def checksum_of(completion: Sampled) -> int:
    """Return a checksum of tokens and log-probs, for accidents; twice as fast as `digest` of them."""
    return digest(zlib.crc32(completion.tokens.data), zlib.crc32(completion.logprobs.data))


def sample_and_score(
    generate: Callable[[Arrived], list[Sampled | None]],
    problems: Sequence[dict],
    scorer: Scorer,
    world: World,
    *,
    collective: bool = True,
    progress: StepProgress | None = None,
    audited: Sequence[bool] | None = None,
) -> tuple[list[Sampled | None], list[Facts | None]]:
    """Return the answers that this rank has, and the facts about all, one for each of `problems`. Collective.

    generate: calls an engine with a function to call when an answer arrives. The facts about an answer that was aborted
    are None. collective: False if only this rank samples. progress: a step of it is an answer that arrives here. audited:
    answers whose verdict is checked a second time. Raises on every rank as `Scorer.start`.
    """
    scores: dict[int, Callable[[], Score]] = {}
    seconds: dict[int, Callable[[], Second]] = {}

    def arrived(number: int, completion: Sampled) -> None:
        problem = problems[number]
        asked = problem["question"], problem["answer"]
        item = Answered(*asked, completion.tokens, completion.finish_reason)
        scores[number] = scorer.start(item)
        if audited is not None and audited[number]:
            seconds[number] = scorer.second(item)
        if progress is not None:
            progress.advance()

    here = generate(arrived)

    def own_facts() -> dict[int, Facts]:
        return {
            i: facts_of(c, scores[i](), world.rank, seconds[i]() if i in seconds else None)
            for i, c in enumerate(here)
            if c is not None
        }

    with phase("verify"):
        mine = on_every(world, own_facts) if collective else own_facts()
        parts = world.all_gather_objects(mine) if collective else [mine]
    facts = {i: of_one for part in parts for i, of_one in part.items()}
    return here, list(map(facts.get, range(len(problems))))


class Journal:
    """The answers of stage 4's steps on disk, so that a step that was killed asks again for unfinished ones alone.

    Each rank appends the answers that arrive at it to a file of its own in checkpoints/rollouts/: an Arrow stream with a
    batch for each, which a kill leaves readable up to the last whole one. The step's table takes the place of its
    journals (`rollout_log.py`). A run that goes on from the checkpoint of step k samples the later steps once more. It
    takes an answer from a journal or a table if its request is equal and so are the weights of each of its spans, by
    their checksum: of the present weights, and of those before the last update, of which asynchronous answers are.
    So tables after the checkpoint serve as journals, and nothing finished is sampled again while the weights repeat
    bit by bit. An answer that went on over a sync (rollout.partial) is taken only once its newer weights are there again.
    Answers that are sampled anew are in other company: their log-probs may differ in the last bit, as at another
    rollout.max_batch.
    """

    def __init__(self, path: Path, run: RunConfig, world: World) -> None:
        """path: the stage's folder. Collective."""
        self.folder, self._tables = path / "checkpoints" / "rollouts", path / "rollouts"
        self._world, rollout = world, run.rollout
        self.engine = (
            rollout.engine, rollout.dtype, rollout.quantization, rollout.kv_cache_dtype, rollout.asynchronous
        )  # fmt: skip
        """settings of an engine that decide what it samples, beside each request's own"""
        self.weights: dict[int, int] = {}
        """checksum by version, of the last two that the engine had"""
        self._found: dict[int, Sampled] = {}
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._file = self.folder
        self._left = on_main(world, self._listed)

    def _listed(self) -> dict[int, list[Path]]:
        """Return the files of earlier processes by step, counted from 1."""
        found = defaultdict(list)
        for path in sorted([*self._tables.glob(FILES), *self.folder.glob(FILES)]):
            found[int(path.name.partition(".")[0])].append(path)
        return dict(found)

    def note_weights(self, model: Model) -> None:
        """Keep the checksum of the weights that the engine gets next. Collective."""
        own = checksums([parameter.data for _, parameter in model.named_parameters()])
        now = {model.num_updates: digest(*model.world.all_gather_objects(own))}
        before = {v: c for v, c in self.weights.items() if v not in now}
        self.weights = dict(list(before.items())[-1:]) | now

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Read what earlier processes left of `step`, counted from 0, on rank 0; the block samples that step."""
        here = self._left.get(step + 1, []) if self._world.is_main else []
        self._found = {request: c for path in here for request, c in self._answers(path)}
        self._file = (
            self.folder / f"{step + 1:06d}.{self._world.rank}.{secrets.token_hex(4)}.arrows"
        )
        try:
            yield
        finally:
            self._found = {}
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def generate(
        self,
        engine: EngineSampler,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        requests: list[int],
        first: First | None,
        collective: bool,
        arrived: Arrived,
    ) -> list[Sampled | None]:
        """Return the completions as `engine.generate` does, those of earlier processes on rank 0. requests: by identity."""

        def noted(number: int, completion: Sampled) -> None:
            self._append(requests[number], completion)
            arrived(number, completion)

        if not self._left:
            return engine.generate(prompts, params, seeds, noted, first)
        found = {i: self._found[r] for i, r in enumerate(requests) if r in self._found}
        taken = self._world.broadcast_object(list(found)) if collective else list(found)
        if taken and self._world.is_main:
            print(f"rlvr: {len(taken)} of {len(prompts)} answers are finished since an earlier start", flush=True)  # fmt: skip
        for number, completion in found.items():
            arrived(number, completion)
        left = sorted(set(range(len(prompts))) - set(taken))
        if first is not None:
            left, first = first.without(taken)
        given = [prompts[i] for i in left], params, [seeds[i] for i in left]
        here = engine.generate(*given, lambda k, c: noted(left[k], c), first)
        found |= {i: c for i, c in zip(left, here, strict=True) if c is not None}
        return list(map(found.get, range(len(prompts))))

    def _append(self, request: int, completion: Sampled) -> None:
        try:
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a process that is killed loses no whole batch.
                self._writer = pa.ipc.new_stream(pa.OSFile(str(self._file), "wb"), ANSWER)
            row = self.row(request, completion, checksum_of(completion))
            self._writer.write_batch(pa.RecordBatch.from_pylist([row], ANSWER))
        except OSError as error:
            raise OSError(error.errno, f"cannot write: {error}", str(self._file)) from error

    def row(self, request: int, completion: Sampled, checksum: int) -> dict[str, Any]:
        """Return the fields of ANSWER. checksum: of tokens and log-probs."""
        c = completion
        spans = [(*span, self.weights.get(span.version)) for span in c.versions]
        return {
            "request": request,
            "finish_reason": c.finish_reason,
            "versions": spans,
            "checksum": digest(request, c.finish_reason, spans, checksum),
            "tokens": c.tokens,
            "logprobs": c.logprobs,
        }

    def _answers(self, path: Path) -> Iterator[tuple[int, Sampled]]:
        """Yield requests and answers of a file: those that are whole and of weights that are known here."""
        try:
            if path.suffix == ".parquet":
                batches = pq.ParquetFile(path).iter_batches(64, columns=ANSWER.names)
            else:
                batches = pa.ipc.open_stream(path.read_bytes())
            for batch in batches:
                batch.validate(full=True)
                for i, row in enumerate(batch.drop_columns(["tokens", "logprobs"]).to_pylist()):
                    spans = [tuple(span.values()) for span in row["versions"]]
                    completion = Sampled(
                        tokens=batch["tokens"][i].values.to_numpy(),
                        logprobs=batch["logprobs"][i].values.to_numpy(),
                        finish_reason=row["finish_reason"],
                        versions=tuple(Span(*span[:3]) for span in spans),
                    )
                    # Other weights have another checksum too, but all unknown ones are alike.
                    now = self.row(row["request"], completion, checksum_of(completion))
                    known = all(span[0] in self.weights for span in spans)
                    if known and now["checksum"] == row["checksum"]:
                        yield row["request"], completion
        except (pa.ArrowException, OSError) as error:
            print(f"rlvr: {path}: the rest of it was not written whole: {error}", flush=True)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rollout:
    """One sampled answer with its reward. `advantage` is set once its group is complete."""

    id: str
    prompt_id: str
    step: int
    prompt: np.ndarray
    """(p,) int32"""
    temperature: float
    reward: float
    facts: Facts
    answer: Sampled | None
    """tokens and log-probs; None on ranks that do not have them"""
    request: int = 0
    """checksum of what was asked: prompt, seed, sampling settings, kind of engine"""
    advantage: float = 0.0

    def __len__(self) -> int:
        """Return the number of input positions: one fewer than tokens."""
        return len(self.prompt) + self.facts.length - 1

    @property
    def truncated(self) -> bool:
        """True for an answer that was cut off at max_new_tokens."""
        return self.facts.finish_reason == "length"

    def digest(self) -> int:
        """Return a checksum of all that training sees."""
        numbers = self.temperature, self.reward, self.advantage
        facts = self.facts
        spans = [list(span) for span in facts.versions]
        return digest(self.id, self.prompt, facts.checksum, facts.finish_reason, *numbers, spans)

    def age(self, version: int) -> int:
        """Return the staleness: updates up to `version` since the oldest token was sampled."""
        return version - min(span.version for span in self.facts.versions)

    def ages(self, version: int) -> np.ndarray:
        """Return (n,) int64: the staleness of each token of the answer, in updates."""
        spans = self.facts.versions
        sizes = [span.end - span.start for span in spans]
        return np.repeat([version - span.version for span in spans], sizes)


def without_answers(groups: list[list[Rollout]]) -> list[list[Rollout]]:
    """Return the groups as ranks without the answers have them."""
    return [[replace(rollout, answer=None) for rollout in group] for group in groups]


def costs_of(rollouts: Sequence[Rollout], config: ModelConfig) -> list[int]:
    """Return the FLOPs of each rollout in training."""
    return [flops_of([len(rollout)], config) for rollout in rollouts]


@phase("communication")
def to_trainers(rollouts: Sequence[Rollout], model: Model) -> list[Rollout]:
    """Return the rollouts with the answers of this data rank's share of the batch, as `micro_batches` deals it. Collective.

    The cheapest goes to every rank: one that has too few micro-batches makes an idle one of it.
    """
    world = model.world
    if world.world_size == 1 or not rollouts:
        return list(rollouts)
    costs = costs_of(rollouts, model.config)
    cheapest = min(range(len(rollouts)), key=lambda i: costs[i])
    dealt = shares(costs, world.data_size)
    wanted = [{*dealt[data_rank], cheapest} for data_rank in world.all_gather_objects(world.data_rank)]  # fmt: skip
    return delivered(rollouts, wanted, world)


def on_rank_0(rollouts: Sequence[Rollout], world: World) -> list[Rollout]:
    """Return the rollouts with all answers on rank 0. Collective."""
    everything = set(range(len(rollouts)))
    return delivered(rollouts, [everything, *[set()] * (world.world_size - 1)], world)


def delivered(
    rollouts: Sequence[Rollout], wanted: Sequence[set[int]], world: World
) -> list[Rollout]:
    """Return the rollouts with the answers that this rank wants, and no other. Collective.

    wanted: for each rank the indices of rollouts. Raises DivergedError if an answer is not the one that was scored.
    """
    if world.world_size == 1:
        return list(rollouts)
    me, ranks = world.rank, range(world.world_size)
    lengths = [rollout.facts.length for rollout in rollouts]
    routes = {
        (source, target): [i for i in sorted(wanted[target]) if rollouts[i].facts.holder == source]
        for source in ranks
        for target in ranks
        if me in (source, target)
    }
    size = {route: sum(2 * lengths[i] for i in indices) for route, indices in routes.items()}
    answers = [rollouts[i].answer for target in ranks for i in routes[me, target]]
    sent = [part for a in answers if a is not None for part in (a.tokens, a.logprobs.view(np.int32))]  # fmt: skip
    given = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *sent])).to(world.device)
    taken = given.new_empty(sum(size[source, me] for source in ranks))
    sizes = [size[source, me] for source in ranks], [size[me, target] for target in ranks]
    dist.all_to_all_single(taken, given, *sizes)
    arrays, here = taken.cpu().numpy(), {}
    for i in (i for source in ranks for i in routes[source, me]):
        tokens, logprobs, arrays = np.split(arrays, [lengths[i], 2 * lengths[i]])
        here[i] = answer_of(rollouts[i].facts, tokens, logprobs.view(np.float32))
        if checksum_of(here[i]) != rollouts[i].facts.checksum:
            raise DivergedError(f"{rollouts[i].id}: rank {me} got other tokens than were scored")
    return [replace(rollout, answer=here.get(i)) for i, rollout in enumerate(rollouts)]


def answer_of(facts: Facts, tokens: np.ndarray, logprobs: np.ndarray) -> Sampled:
    """Return the answer with these facts."""
    return Sampled(
        tokens=tokens,
        logprobs=logprobs,
        finish_reason=facts.finish_reason,  # pyright: ignore[reportArgumentType]
        versions=facts.versions,
    )
