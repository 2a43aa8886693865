"""The start model of stage 1: a Hugging Face folder or, for the demo, a new model and tokenizer."""

import dataclasses
from itertools import islice
from pathlib import Path

from phimini.model.config import ModelConfig, preset
from phimini.model.io.chat import TEMPLATES, render_example
from phimini.model.io.huggingface import (
    ROPE_FACTORS_KEY,
    check_tensors,
    load_config,
    read_tensors,
    save_config,
    save_reference,
    write_tensors,
)
from phimini.model.io.json_files import numbered_rows, read_object
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.model.reference import Phi4Mini
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import ROLLOUT_FIELDS
from phimini.stages.run.progress import tracked, work
from phimini.stages.run.stage_folder import Stage

TOKENIZER_TEXTS = 4000


def base_config(run: RunConfig) -> ModelConfig:
    """Return the run's model, with the rope table that the run asks for.

    Raises ValueError for an unknown preset, an unreadable config.json, or the export of a run that was trained with the
    other rope table.
    """
    if run.base == "random":
        return dataclasses.replace(preset(run.model), rope_factors=run.rope_factors)
    config, path = load_config(run.base, run.rope_factors), Path(run.base) / "config.json"
    trained = read_object(path).get(ROPE_FACTORS_KEY, run.rope_factors)
    if config.long_factor is not None and trained != run.rope_factors:
        raise ValueError(
            f"{path}: the model was trained with its {trained} rope table, got rope_factors={run.rope_factors}; "
            f"expected rope_factors={trained}"
        )
    return config


def base(run: RunConfig, *, redo: bool = False) -> Path:
    """Write `base/model/`. Raises ValueError for an unknown preset or an unreadable folder."""
    stage = Stage.open(run, "base", redo=redo)
    if stage.complete:
        return stage.path
    stage.prepare(redo=redo)
    directory = stage.path / "model"
    config = base_config(run)
    if run.base == "random":
        rows = numbered_rows(Path(run.out) / "curate" / "midtrain.jsonl", ROLLOUT_FIELDS)
        texts = [
            render_example(row["question"], row["response"], run.chat_template)
            for _, row in islice(rows, TOKENIZER_TEXTS)
        ]
        tokenizer = train_tiny_tokenizer(texts, vocab_size=config.vocab_size)
        model = Phi4Mini(config)
        model.init_weights(derive(run.seed, "init"))
        save_reference(model, directory, stop_ids=tokenizer.stop_ids)
    else:
        tokenizer = Tokenizer.load(run.base)
        files = read_tensors(run.base)
        check_tensors(config, files)
        dtype = files[next(iter(files))].dtype
        save_config(config, directory, stop_ids=tokenizer.stop_ids, dtype=dtype)
        names = tracked(list(files), work("base", len(files), run.out))
        write_tensors(((name, files[name]) for name in names), directory)
    tokenizer.save(directory, chat_template=TEMPLATES[run.chat_template])
    stage.finish({"parameters": config.num_parameters, "vocabulary": tokenizer.vocab_size})
    return stage.path
