"""Token ids of the training sets, encoded once per run; the training stages map the files.

Writes `tokenize/`: a folder of indexed datasets (`data/token_files.py`) for each of `midtrain`, `sft` and `validation`. The
summary has the fingerprint of tokenizer and chat template, and the counts. Shards that are whole are kept by a rerun.
"""

import os
from pathlib import Path

from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.token_files import TokenSet, fingerprint, shards_of, write_shards
from phimini.stages.run.outputs import TOKENIZED
from phimini.stages.run.progress import work
from phimini.stages.run.stage_folder import Stage


def tokenize(run: RunConfig, *, redo: bool = False) -> Path:
    """Write the token sets into tokenize/ and return the folder. Not collective: one process calls it and starts others.

    Raises ValueError that names file and line of a row that cannot be encoded, or a changed setting or input.
    """
    stage = Stage.open(run, "tokenize", redo=redo)
    if stage.complete:
        return stage.path
    if not redo:
        stage.check_begun()
    stage.prepare(redo=redo)
    out = Path(run.out)
    tokenizer = Tokenizer.load(out / "base" / "model")
    shards = [s for name, rows in TOKENIZED.items() for s in shards_of(out / rows, stage.path / name)]  # fmt: skip
    names = lambda shard: [str(path.relative_to(stage.path)) for path in shard.files]
    left = [shard for shard in shards if not stage.made.keys() >= set(names(shard))]
    workers = run.tokenize.workers or len(os.sched_getaffinity(0))
    with work("tokenize", sum(shard.span.lines for shard in left), run.out) as progress:
        note = lambda rows: progress.update(rows) if rows else None
        for shard in write_shards(left, tokenizer, tokenizer.chat_template, workers, note):
            stage.record(*names(shard))
    sets = {name: TokenSet(stage.path / name, out / rows) for name, rows in TOKENIZED.items()}
    counts = {name: tokens.counts() for name, tokens in sets.items()}
    stage.finish({"fingerprint": fingerprint(tokenizer, tokenizer.chat_template), "sets": counts})
    return stage.path
