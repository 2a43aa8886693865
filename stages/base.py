"""The start model of stage 1: a Hugging Face folder or, for the demo, a new model and tokenizer."""

from itertools import islice
from pathlib import Path

from phimini.model.config import ModelConfig
from phimini.model.io.chat import check_template, render_example, template_of
from phimini.model.io.huggingface import (
    ROPE_FACTORS_KEY,
    check_tensors,
    config_of,
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

    Raises ValueError for an unknown preset, a config.json that cannot be read or expressed, or the export of a run that
    was trained with the other rope table.
    """
    if run.base == "random":
        return config_of(run.model, run.rope_factors)
    config, path = load_config(run.base, run.rope_factors), Path(run.base) / "config.json"
    trained = read_object(path).get(ROPE_FACTORS_KEY, run.rope_factors)
    if config.long_factor is not None and trained != run.rope_factors:
        raise ValueError(
            f"{path}: the model was trained with its {trained} rope table, got rope_factors={run.rope_factors}; "
            f"expected rope_factors={trained}"
        )
    return config


def base(run: RunConfig, *, redo: bool = False) -> Path:
    """Write `base/model/`. Raises ValueError as `base_config`, and for weights or a chat template that do not fit."""
    stage = Stage.open(run, "base", redo=redo)
    if stage.complete:
        return stage.path
    stage.prepare(redo=redo)
    directory = stage.path / "model"
    config, template = base_config(run), template_of(run.chat_template)
    if run.base == "random":
        rows = numbered_rows(Path(run.out) / "curate" / "midtrain.jsonl", ROLLOUT_FIELDS)
        texts = [
            render_example(row["question"], row["response"], template)
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
    check_template(run.chat_template, tokenizer)
    tokenizer.save(directory, chat_template=template)
    stage.finish({"parameters": config.num_parameters, "vocabulary": tokenizer.vocab_size})
    return stage.path
