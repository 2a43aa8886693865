"""Base: what stage 1 starts from. A Hugging Face folder, or (for the demo) a new model and tokenizer."""

import dataclasses
from pathlib import Path

from phimini.model.chat import render_example
from phimini.model.config import preset
from phimini.model.huggingface import load_config, load_reference, save_reference
from phimini.model.reference import Phi4Mini
from phimini.model.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.stages.config import RunConfig
from phimini.stages.distill import ROLLOUT_FIELDS
from phimini.stages.jsonl import read_rows
from phimini.stages.seeds import derive
from phimini.stages.stage import Stage

TOKENIZER_TEXTS = 4000


def base(run: RunConfig, *, redo: bool = False) -> Path:
    """Write `base/model/`. Raises ValueError for an unknown preset or an unreadable folder."""
    stage = Stage.open(run, "base", redo=redo)
    if stage.complete:
        return stage.path
    stage.prepare(redo=redo)
    if run.base == "random":
        config = dataclasses.replace(preset(run.model), rope_factors=run.rope_factors)
        rows = read_rows(Path(run.out) / "curate" / "midtrain.jsonl", ROLLOUT_FIELDS)[
            :TOKENIZER_TEXTS
        ]
        texts = [
            render_example(row["question"], row["response"], run.chat_template) for row in rows
        ]
        tokenizer = train_tiny_tokenizer(texts, vocab_size=config.vocab_size)
        model = Phi4Mini(config)
        model.init_weights(derive(run.seed, "init"))
    else:
        config = dataclasses.replace(load_config(Path(run.base)), rope_factors=run.rope_factors)
        tokenizer = Tokenizer.load(Path(run.base))
        model = load_reference(Path(run.base), config)
    save_reference(model, stage.path / "model")
    tokenizer.save(stage.path / "model")
    stage.finish({"parameters": config.num_parameters, "vocabulary": tokenizer.vocab_size})
    return stage.path
