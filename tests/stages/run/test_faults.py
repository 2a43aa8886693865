"""The fault suite: runs that are killed at random moments end bit-equal, and no damaged file is accepted in silence.

`make test` runs a slice of it, `make faults` the whole; the last test prints the counts.
"""

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from damages import answer, damages
from fault_runs import VLLM, command, interrupt, snapshot, words_of
from kills import Chain, killed_run
from vllm_process import in_vllm

RANKS = {
    "1 rank": (),
    "2 data ranks": ("processes=2",),
    "2 tensor ranks": ("processes=2", "tensor_parallel=2"),
}
# Kills come at most so many operations after a start; a whole run makes about 1,500 of them.
MOST = {"1 rank": 160, "2 data ranks": 170, "2 tensor ranks": 170}
CHAINS = [
    *(("1 rank", seed) for seed in range(100, 106)),
    *(("2 data ranks", seed) for seed in range(200, 202)),
    *(("2 tensor ranks", seed) for seed in range(300, 302)),
]
VLLM_CHAINS = [("1 rank", 400), ("1 rank", 401), ("2 data ranks", 500)]
INTERRUPTED = {"midtrain": 3, "rollout_dpo": 2, "rlvr": 3}
"""stages, and the step after which they were killed"""
DAMAGES = {"finished": 75, "midtrain": 20, "rollout_dpo": 25, "rlvr": 30}
AT_LEAST = {"kills": 150, "damages": 100}

counts: Counter[str] = Counter()


def whole_run(out: Path, words: list[str]) -> dict[str, Any]:
    """Return the snapshot of the run in `out`, which is made if it is missing."""
    log = out.with_suffix(".log")
    if not out.exists():
        assert command(words_of(out, *words), log) == 0, log.read_text()[-3000:]
    return snapshot(out)


def vllm_chain(folder: Path, ranks: str, seed: int) -> Chain:
    words = [*VLLM, *RANKS[ranks]]
    reference = whole_run(folder / f"vllm {ranks}", words)
    return killed_run(folder / f"{seed}", seed, 2 * MOST[ranks], reference, *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def made(folder: Path, name: str) -> Path:
    """Return a finished run, or one that was killed in the stage `name`; it is made once."""
    if name == "finished":
        whole_run(folder / "1 rank", [])
        return folder / "1 rank"
    out, log = folder / name, folder / f"{name}.log"
    if not out.exists():
        killed = command(words_of(out), log, interrupt(name, INTERRUPTED[name]))
        assert killed == -signal.SIGKILL, log.read_text()
    return out


def judge_chain(chain: Chain, kind: str) -> None:
    counts[f"kills, {kind}"] += chain.kills
    assert chain.kills and not chain.differing, (chain.differing, chain.moments)


def judge_damages(name: str, count: int, folder: Path) -> None:
    reference, run, wrong = snapshot(made(folder, "finished")), made(folder, name), []
    for damage in damages(name, run, count, seed=7):
        found = answer(damage, run, folder / "damaged", reference)
        counts[f"damages of {name}: {found.kind:.12}"] += 1
        if found.kind not in ("named", "made again"):
            wrong.append((damage, found))
    assert not wrong, "\n".join(map(str, wrong))


def test_a_slice_of_the_kills(folder: Path) -> None:
    reference = whole_run(folder / "1 rank", [])
    chain = killed_run(folder / "slice", 1, 700, reference)
    assert chain.kills and not chain.differing, (chain.differing, chain.moments)


def test_a_slice_of_the_damages(folder: Path) -> None:
    judge_damages("finished", 6, folder)
    judge_damages("rlvr", 5, folder)
    counts.clear()


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "seed"), CHAINS)
def test_killed_runs_end_bit_equal(ranks: str, seed: int, folder: Path) -> None:
    words = list(RANKS[ranks])
    reference = whole_run(folder / ranks, words)
    judge_chain(killed_run(folder / f"{seed}", seed, MOST[ranks], reference, *words), ranks)


@pytest.mark.faults
@pytest.mark.vllm
@pytest.mark.parametrize(("ranks", "seed"), VLLM_CHAINS)
def test_killed_runs_with_vllm_end_bit_equal(ranks: str, seed: int, folder: Path) -> None:
    judge_chain(in_vllm(vllm_chain, folder, ranks, seed, timeout_s=3000)[0], f"vLLM, {ranks}")


@pytest.mark.faults
@pytest.mark.parametrize("name", DAMAGES)
def test_no_damage_is_accepted_in_silence(name: str, folder: Path) -> None:
    judge_damages(name, DAMAGES[name], folder)


@pytest.mark.faults
def test_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("", *(f"{number:5} {kind}" for kind, number in sorted(counts.items())), sep="\n")
    for kind, least in AT_LEAST.items():
        total = sum(number for name, number in counts.items() if name.startswith(kind))
        assert total >= least, f"{total} {kind}, expected at least {least}"
