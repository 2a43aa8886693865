"""`phimini clean executor=slurm`: the job arrays that it submits to a recorded `sbatch`, and their tasks, run one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_cases import SETTINGS, clean, corpus, digests

from phimini.stages.cli import main

RECORDING = """#!/bin/bash
number=$(($(ls "{folder}" | wc -l) + 1))
cp "${{@: -1}}" "{folder}/$(printf %02d $number)"
printf '%s\\n' "${{@:1:$#-1}}" >"{folder}.arguments.$number"
{then}
echo "Submitted batch job $number"
"""
# The tasks of an array, the last first, with the variables that Slurm sets; sbatch waits, so dependencies hold.
RUNNING = """
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "${{@: -1}}")
for task in $(seq $last -1 {first}); do
  RUN_OFFSET=0 SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "${{@: -1}}" || exit 1
done >&2
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a cluster's commands on the PATH; return the folder of the scripts that were submitted."""
    folder, programs = tmp_path / "scripts", tmp_path / "bin"
    for made in (folder, programs):
        made.mkdir()
    for name, text in {
        "sbatch": RECORDING.format(folder=folder, then=""),
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }.items():  # fmt: skip
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    return folder


def arguments(folder: Path, number: int) -> list[str]:
    return Path(f"{folder}.arguments.{number}").read_text().split()


SLURM = ("executor=slurm", "slurm.partition=cpu", "workers=3", "slurm.account=me", "slurm.time=01:00:00", "slurm.memory_gb=8")  # fmt: skip


def test_each_step_is_an_array_that_waits_for_the_one_before(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("PHIMINI_TEACHER_KEY", "sk-a-secret")
    corpus(tmp_path)
    out = clean(tmp_path, *SLURM, "slurm.array=5", "judge.model=sums", f"slurm.venv={tmp_path / 'my venv'}")  # fmt: skip
    # The 8 shards of a step are two jobs of at most 5 tasks, the 10 buckets as well.
    names = [n for n, jobs in {"check": 2, "sign": 2, "buckets": 2, "cluster": 1, "questions": 1, "write": 2, "report": 1}.items() for _ in range(jobs)]  # fmt: skip
    scripts = [path.read_text() for path in sorted(sbatch.iterdir())]
    assert [re.findall(r"--job-name=clean-(\w+)", text)[0] for text in scripts] == names
    for number, (path, text) in enumerate(zip(sorted(sbatch.iterdir()), scripts, strict=True), start=1):  # fmt: skip
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
        single = names[number - 1] in ("cluster", "questions", "report")
        for line in ("partition=cpu", "account=me", "time=01:00:00", "mem-per-cpu=8G", f"array=0-{0 if single else 4}%3", "requeue"):  # fmt: skip
            assert f"#SBATCH --{line}\n" in text, text
        assert f"srun  -l -n 1 launch_pickled_pipeline {out}/logs/{names[number - 1]}/executor.pik" in text  # fmt: skip
        waits = [word for word in arguments(sbatch, number) if word.startswith("--dependency")]
        assert bool(waits) == (number > 1) and (number == 1 or f":{number - 1}" in waits[0]), waits
    said = capsys.readouterr().out
    assert f"clean: sign: job 4, {out}/logs/sign/launch_script.slurm\n" in said
    assert not [p for p in out.rglob("*") if p.is_file() and b"sk-a-secret" in p.read_bytes()]


def test_the_arrays_give_the_same_bytes_and_only_missing_tasks_are_submitted_again(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path, 6)
    words = ("near.buckets=2",)
    out = clean(tmp_path, *words)
    whole = digests(out)
    assert len(whole) == 7, "two shards: kept, dropped by a step, near-duplicates; and the report"
    out.rename(tmp_path / "whole")
    program = tmp_path / "bin" / "sbatch"
    program.write_text(RECORDING.format(folder=sbatch, then=f"[[ $number == 1 ]] || exit 1; {RUNNING.format(first=1)}"))  # fmt: skip
    # The first task of the first array is lost, and then the queue.
    assert main(["clean", str(tmp_path / "source"), str(out), *SETTINGS, f"heldout={tmp_path / 'held.jsonl'}", *words, *SLURM]) == 1  # fmt: skip
    assert "clean: sign: sbatch ended with 1; the same command goes on" in capsys.readouterr().err
    program.write_text(RECORDING.format(folder=sbatch, then=RUNNING.format(first=0)))
    capsys.readouterr()
    clean(tmp_path, *words, *SLURM)
    scripts = [path.read_text() for path in sorted(sbatch.iterdir())]
    arrays = [(re.findall(r"clean-(\w+)", text)[0], re.findall(r"array=0-(\d+)", text)[0]) for text in scripts]  # fmt: skip
    assert arrays == [("check", "1"), ("sign", "1"), ("check", "0"), ("sign", "1"), ("buckets", "1"), ("cluster", "0"), ("questions", "0"), ("write", "1"), ("report", "0")]  # fmt: skip
    assert digests(out) == whole
    assert f"clean: {out / 'rows'}: " in capsys.readouterr().out
