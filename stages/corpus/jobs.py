"""The steps of `clean` as datatrove's pipelines, and its executors: processes here, or Slurm's job arrays."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from loguru import logger

from phimini.stages.config.cleaning import CleanOptions, SlurmJobs
from phimini.stages.corpus import blocks
from phimini.stages.corpus.report import make_report
from phimini.stages.corpus.shards import Shard

NEAR = "near-duplicate of another correct row"


class Job(NamedTuple):
    """A step: its name, its pipeline and the number of its tasks."""

    name: str
    pipeline: list[Any]
    tasks: int


class Local(LocalPipelineExecutor):
    """Tasks in processes that end with this one; an error is told once, by who waits for them."""

    def run(self) -> Any:
        global _starting
        _starting = True
        logger.disable("datatrove")
        try:
            return super().run()
        finally:
            _starting = False


_starting = False
"""True while the forks of this process are workers"""


def _become_worker() -> None:
    """Let a signal end a worker at once: one that raises here, in the pool's locks, would leave the others waiting."""
    if _starting:
        # Late: it imports torch, which the tasks of a job array do not need.
        from phimini.parallel.ranks.process import end_with_parent

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_with_parent()


os.register_at_fork(after_in_child=_become_worker)


class Slurm(SlurmPipelineExecutor):
    """Job arrays; the report has the counts, so no job merges datatrove's statistics."""

    def launch_merge_stats(self) -> None:
        pass


def jobs(options: CleanOptions, shards: list[Shard], out: Path) -> list[Job]:
    """Return the steps in their order."""
    work, answers, num_shards = out / "work", out / "answers", len(shards)
    near, checked = options.near, work / "checked" / "rollouts"
    check = [
        blocks.read(shards, options),
        *([blocks.decontaminate(options, work / "heldout.jsonl")] if options.heldout else []),
        blocks.verify(),
        blocks.repetition(options.max_repetition),
        *([blocks.judge(options, answers)] if options.judge.model is not None else []),
        blocks.count(work / "counts"),
        blocks.write(work / "checked"),
    ]
    # As they are used: the words of `blocks.Signature`.
    config = MinhashConfig(near.words, near.buckets, near.hashes)
    signatures, buckets, removed = (str(work / "near" / name) for name in ("signatures", "buckets", "removed"))  # fmt: skip
    near_jobs = [
        Job("sign", [blocks.read_checked(checked), blocks.Signature(signatures, config)], num_shards),
        Job("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], near.buckets),
        Job("cluster", [MinhashDedupCluster(buckets, removed, config=config)], 1),
    ]  # fmt: skip
    write = [
        blocks.read_checked(checked),
        *([MinhashDedupFilter(removed, blocks.write(work / "final", NEAR))] if near.remove else []),
        blocks.annotate(work / "questions.npy", options.label.model),
        blocks.write(work / "final"),
    ]
    return [
        Job("check", check, num_shards),
        *(near_jobs if near.remove else []),
        Job("questions", [blocks.gather(options, work, answers, num_shards)], 1),
        Job("write", write, num_shards),
        Job("report", [blocks.at_the_end(lambda: make_report(options, out))], 1),
    ]


def run(options: CleanOptions, shards: list[Shard], out: Path) -> None:
    """Run the steps one after the other, or submit them. Raises as the steps do."""
    out = (
        out.resolve()
    )  # datatrove takes a relative folder for one of the current folder, which a job's is not
    if options.executor == "local":
        for job in jobs(options, shards, out):
            print(f"clean: {job.name}: {job.tasks} tasks", flush=True)
            Local(
                job.pipeline, job.tasks, min(options.workers, job.tasks), str(out / "logs" / job.name), start_method="fork"
            ).run()  # fmt: skip
        return
    before = None
    for job in jobs(options, shards, out):
        before = _array(options.slurm, options.workers, job, out / "logs" / job.name, before)
        try:
            before.run()
        except subprocess.CalledProcessError as error:
            raise OSError(f"clean: {job.name}: sbatch ended with {error.returncode}; the same command goes on") from error  # fmt: skip
        script = out / "logs" / job.name / "launch_script.slurm"
        print(f"clean: {job.name}: {'complete' if before.job_id == -1 else f'job {before.job_id}, {script}'}", flush=True)  # fmt: skip


def _array(settings: SlurmJobs, workers: int, job: Job, logs: Path, before: Slurm | None) -> Slurm:
    return Slurm(
        job.pipeline, job.tasks, settings.time, str(settings.partition), mem_per_cpu_gb=settings.memory_gb, workers=workers,
        job_name=f"clean-{job.name}", qos="", venv_path=str(Path(settings.venv, "bin", "activate").resolve()) if settings.venv else "",
        sbatch_args={"account": settings.account} if settings.account else {}, max_array_size=settings.array, depends=before,
        logging_dir=str(logs),
    )  # fmt: skip


def check_slurm(options: CleanOptions) -> None:
    """Raise ValueError if jobs cannot be submitted."""
    if options.slurm.partition is None:
        raise ValueError("clean: executor=slurm: expected slurm.partition=NAME, got none")
    if shutil.which("sbatch") is None:
        raise ValueError(
            "clean: executor=slurm: found no sbatch on the PATH; submit from a login node"
        )
