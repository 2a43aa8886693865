"""Answers of stage 2's model, of which stage 3 makes its pairs."""

from pathlib import Path

from phimini.model.io.json_files import Row, array_text, read_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.world import World
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import PROBLEM_FIELDS, encode_problems
from phimini.stages.rl.groups import check_room
from phimini.stages.rl.rollouts import sample_and_score
from phimini.stages.rl.slices import in_slices
from phimini.stages.rollout.build import build_engine
from phimini.stages.rollout.engine import release_memory
from phimini.stages.run.audits import is_audited
from phimini.stages.run.progress import StepProgress
from phimini.stages.run.stage_folder import Stage
from phimini.stages.verify.scorer import Scorer


def sample_answers(
    run: RunConfig, world: World, stage: Stage, model: Model, tokenizer: Tokenizer
) -> list[Path]:
    """Sample answers to the first prompts, and return the files in `rollouts/`, one for each slice. Collective.

    Raises ValueError if a prompt has no room for an answer.
    """
    config = run.rollout_dpo
    rows = read_rows(Path(run.out) / "distill" / "prompts.jsonl", PROBLEM_FIELDS)
    problems = rows[: config.num_prompts]
    prompts = encode_problems(tokenizer, problems, tokenizer.chat_template)
    check_room(prompts, config, "rollout_dpo")
    engine = build_engine(run, model.config, world)
    engine.sync(model)
    scorer = Scorer("rlvr.reward", run.rlvr.reward, run.rollout.judges, tokenizer.decode)
    params = SamplingParams(
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        stop_ids=tokenizer.stop_ids,
    )

    def rows_of(part: list[Row], progress: StepProgress) -> list[Row]:
        asked = [(problem, k) for problem in part for k in range(config.rollouts_per_prompt)]
        given = [prompts[problem["id"]] for problem, _ in asked]
        seeds = [derive(run.seed, "rollout_dpo", problem["id"], k) for problem, k in asked]
        generate = lambda arrived: engine.generate(given, params, seeds, arrived)
        audited = [
            is_audited(run.seed, run.audit, "rollout_dpo", problem["id"], k) for problem, k in asked
        ]
        of_asked = [problem for problem, _ in asked]
        here, facts = sample_and_score(
            generate, of_asked, scorer, world, progress=progress, audited=audited
        )
        tokens = {i: c.tokens for i, c in enumerate(here) if c is not None}
        texts = scorer.texts(tokens.values())
        own = {i: (text, array_text(tokens[i])) for i, text in zip(tokens, texts, strict=True)}
        answers = {i: pair for some in world.gather_objects(own) for i, pair in some.items()}
        return [
            {
                "id": f"{problem['id']}/{k}",
                "problem_id": problem["id"],
                "family": problem.get("family", ""),
                "level": problem.get("level", 0),
                "question": problem["question"],
                "answer": problem["answer"],
                "response": answers[i][0],
                "response_tokens": answers[i][1],
                "correct": of_one.score > 0,
                "second": of_one.second,
                "finish_reason": of_one.finish_reason,
                "temperature": config.temperature,
            }
            for i, ((problem, k), of_one) in enumerate(zip(asked, facts, strict=True))
            if of_one is not None and world.is_main
        ]

    files = in_slices(stage, "rollouts", problems, config.rollouts_per_prompt, world, rows_of)
    release_memory(engine)
    return files
