"""Questions for stages 3 and 4 from reasoning-gym's procedural tasks (github.com/open-thought/reasoning-gym; extra `prompts`)"""

import importlib
from collections.abc import Sequence

from phimini.stages.data.packing import derive
from phimini.stages.verify.verdict import verify


def gym_prompts(tasks: Sequence[str], count: int, seed: int) -> list[dict]:
    """Return `count` different questions as rows of `prompts.jsonl`, from each of `tasks` in turn.

    With fewer questions than tasks only the first tasks are used. Each question has a reference answer that our verifier
    accepts: a task whose answers it cannot read (grids, free text) would never be rewarded. Raises ValueError that names a
    task that does not exist or has too few such questions, ImportError that says what to install.
    """
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ImportError(
            "distill.gym_tasks: reasoning-gym is not installed; pip install 'phimini[prompts]'"
        ) from error
    tasks = list(dict.fromkeys(tasks))[:count]
    each = [count // len(tasks) + (i < count % len(tasks)) for i in range(len(tasks))]
    columns = [_of_task(gym, task, n, seed) for task, n in zip(tasks, each, strict=True)]
    rows = [column[i] for i in range(max(each)) for column in columns if i < len(column)]
    return rows


def _of_task(gym, task: str, count: int, seed: int) -> list[dict]:
    looked_at = 4 * count + 20
    try:
        entries = gym.create_dataset(task, size=looked_at, seed=derive(seed, "gym", task) % 2**31)
    except ValueError as error:
        raise ValueError(f"distill.gym_tasks: {task!r}: {error}") from None
    rows: dict[str, dict] = {}
    for i in range(looked_at):
        question, answer = entries[i]["question"], entries[i]["answer"]
        if (
            isinstance(answer, str)
            and "<|" not in question
            and verify(f"\\boxed{{{answer}}}", answer)
        ):
            rows.setdefault(
                question,
                {"id": f"{task}/{i}", "family": task, "level": 0, "question": question, "answer": answer},
            )  # fmt: skip
        if len(rows) == count:
            return list(rows.values())
    raise ValueError(
        f"distill.gym_tasks: {task!r}: {len(rows)} of {looked_at} questions have an answer that can be verified, "
        f"{count} are wanted; another task, or fewer distill.num_prompts"
    )
