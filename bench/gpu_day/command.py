"""The command `phimini gpu-day`: every check that needs a GPU, in a few minutes, on a machine that may have only torch.

    phimini gpu-day minutes=8 out=runs/gpu-day        rows in rows.jsonl, output in log.txt, a summary table at the end
    phimini gpu-day rehearse=true                     the same parts at small shapes on a CPU

Without CUDA the day is a rehearsal, and every row says so.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from phimini.bench.gpu_day.parts import PARTS
from phimini.bench.gpu_day.runner import Outcome, RowFile, environment, run_parts, watch
from phimini.stages.config.options import GpuDayOptions

FACTS = """
import dataclasses, json, sys, torch
from phimini.bench.gate.environment import environment
cuda = torch.cuda.is_available()
memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
facts = dataclasses.asdict(environment()) | {"cuda": cuda, "gpus": torch.cuda.device_count() if cuda else 0, "memory_bytes": memory}
open(sys.argv[1], "w").write(json.dumps(facts))
"""
FACTS_LIMIT_S = 60.0
END_S = 2.0
"""kept for the end of the last part and the summary"""
FP8_STEP_BYTES = 110 * 10**9
"""memory that a 16k step needs without recomputation, which Transformer Engine's linears cannot do selectively"""


def main(verb: str, settings: GpuDayOptions) -> int:
    """Return 0; 1 where a part failed or timed out, or where the GPU's facts cannot be read."""
    started = time.monotonic()
    deadline = started + 60 * settings.minutes
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    facts = facts_of(out, log, min(FACTS_LIMIT_S, 30 * settings.minutes))
    if facts is None:
        print(f"gpu-day: torch does not come up: {log.read_text()[-1000:]}", file=sys.stderr)
        return 1
    rehearse = settings.rehearse or not facts["cuda"]
    mode = "rehearsal on a CPU, no measurement of a GPU" if rehearse else "gpu"
    versions = {name: facts["versions"][name] for name in ("torch", "triton")}
    rows = RowFile(out / "rows.jsonl", {"mode": mode, "device": facts["device"]} | versions)
    rows.add("day", minutes=settings.minutes, facts=facts, parts=[part.name for part in PARTS])
    print(f"gpu-day: {mode}: {facts['device']}, torch {versions['torch']}, triton {versions['triton']}; {settings.minutes:g} minutes; rows in {out / 'rows.jsonl'}", flush=True)  # fmt: skip
    values = {"gpus": facts["gpus"], "recompute": "none" if facts["memory_bytes"] > FP8_STEP_BYTES else "full"}  # fmt: skip
    outcomes = []
    for outcome in run_parts(PARTS, rows, log, deadline - END_S, rehearse=rehearse, values=values):
        outcomes.append(outcome)
        print(line(outcome), flush=True)
    seconds = time.monotonic() - started
    rows.add("summary", seconds=round(seconds, 1), status={o.part: o.status for o in outcomes})
    print("\n".join(["", f"{mode}, {seconds:.0f} s", *map(line, outcomes)]))
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


def facts_of(out: Path, log: Path, limit_s: float) -> dict[str, Any] | None:
    """Return the environment, number and memory of the GPUs, read in another process: CUDA may hang. None if that failed."""
    path = out / "facts.json"
    path.unlink(missing_ok=True)
    rc = watch([sys.executable, "-c", FACTS, str(path)], log, limit_s, environment(False), lambda: None)  # fmt: skip
    if rc != 0:
        return None
    facts = json.loads(path.read_text())
    path.unlink()
    return facts


def line(outcome: Outcome) -> str:
    limit = "" if outcome.limit_s is None else f" of {outcome.limit_s:.0f}"
    rc = "" if outcome.rc in (None, 0) else f", status {outcome.rc}"
    return f"{outcome.part:14} {outcome.seconds:6.1f}{limit} s  {outcome.num_rows:4} rows  {outcome.status}{rc}"
