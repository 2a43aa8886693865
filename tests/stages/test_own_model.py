"""The user's own model, tokenizer, chat template, rows and reward: what fits runs through all stages, the rest is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import run_ranks
from own_model_cases import CHATML, write_own

from phimini.model.io.huggingface import load_reference
from phimini.model.io.json_files import read_json, read_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams, sample
from phimini.stages.cli import main
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.data.token_files import TokenSet
from phimini.stages.recipe import TRAINING
from phimini.stages.report.formats import percent
from phimini.stages.report.page import STAGE_NAMES


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_own(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def run(given: list[str]) -> Path:
    """Run the recipe from the user's own files."""
    assert run_ranks(main, 1, ["recipe", "tiny", *given], timeout_s=400) == [0]
    return Path(override(tiny(), given).out)


def test_a_llama_with_its_own_format_runs_through_all_stages(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert [row["stage"] for row in read_json(run / "results.json")["stages"]] == ["base", *TRAINING]  # fmt: skip
    for stage in TRAINING:
        assert read_json(run / stage / "summary.json")["steps"] >= 2
        score = read_json(run / "evaluate" / f"{stage}.json")["mean_at_8"]
        card = (run / stage / "model" / "README.md").read_text()
        assert f"\n| {STAGE_NAMES[stage]} | {percent(score)} [" in card
        assert "from `llama`" in card and "ends at `<|im_end|>`\n" in card
    pairs = read_rows(run / "rollout_dpo" / "pairs.jsonl", {"chosen": str, "rejected": str})
    assert all(len(pair["chosen"]) % 2 > len(pair["rejected"]) % 2 for pair in pairs), (
        "the user's verdict"
    )
    # The export answers in transformers as here, from the question's words to the same tokens.
    folder = run / "rlvr" / "model"
    ours, tokenizer = load_reference(folder), Tokenizer.load(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    words_of = AutoTokenizer.from_pretrained(folder)
    assert words_of.chat_template == CHATML
    assert theirs.generation_config.eos_token_id == list(tokenizer.stop_ids)
    params = SamplingParams(temperature=0.0, max_new_tokens=24, stop_ids=tokenizer.stop_ids)
    for question in ("What is 2 + 3?", "Solve x - 4 = 11 for x."):
        asked = words_of.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        (answer,) = sample(ours, asked.tolist(), params, [0])
        done = theirs.generate(asked, do_sample=False, max_new_tokens=24)
        assert done[0, asked.shape[1] :].tolist() == answer.tokens.tolist() != []


def test_the_loss_covers_the_answer_and_the_end_of_the_own_format(run: Path) -> None:
    tokenizer = Tokenizer.load(run / "base" / "model")
    examples = TokenSet(run / "tokenize" / "sft", run / "curate" / "sft.jsonl")
    rows = [json.loads(line) for line in (run / "curate" / "sft.jsonl").read_text().splitlines()]
    assert len(examples) == len(rows) == 8
    for example, row in zip(examples, rows, strict=True):
        prompt = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(example.tokens[: example.loss_from]) == prompt
        assert tokenizer.decode(example.tokens[example.loss_from :]) == row["response"] + "<|im_end|>"  # fmt: skip


def test_a_changed_template_makes_the_run_stale(given: list[str], run: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    file = run.parent / "chatml.jinja"
    file.write_text(CHATML + " ")
    try:
        assert main(["base", "tiny", *given]) == 2
    finally:
        file.write_text(CHATML)
    assert re.search(r"chatml\.jinja has changed since .*/base was made from it", capsys.readouterr().err)  # fmt: skip


def test_a_new_model_of_an_own_shape_has_the_template_too(given: list[str], tmp_path: Path) -> None:
    """base=random: a new tokenizer is trained on the rows in the user's format."""
    file = tmp_path / "own.jinja"
    file.write_text(CHATML.replace("<|im_end|>", "<|end|>").replace("<|im_start|>", "§"))
    more = [f"out={tmp_path}/run", "base=random", f"chat_template={file}"]
    for verb in ("distill", "curate", "base", "tokenize"):
        assert main([verb, "tiny", *given, *more]) == 0
    folder = tmp_path / "run" / "base" / "model"
    model, tokenizer = load_reference(folder), Tokenizer.load(folder)
    assert (model.config.num_layers, model.config.model_dim, model.config.rotary_dim) == (2, 64, 32)
    assert tokenizer.chat_template == file.read_text() and "§" in tokenizer.inner.get_vocab()


def edit(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def endless(folder: Path) -> None:
    (folder / "chatml.jinja").write_text(CHATML.replace("<|im_end|>", ""))


UNFIT: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "a bias": (edit("llama/config.json", attention_bias=True), [], r"llama/config\.json: attention_bias: expected it off, got True"),
    "other sizes": (lambda _: None, ["model=tiny"], r"llama/config\.json: num_layers is 2, but model=tiny has 4"),
    "no such shape": (lambda _: None, ["model=nowhere.json"], r"model=nowhere\.json: no such file; expected a Hugging Face config\.json"),
    "no tokenizer": (without("llama/tokenizer.json"), [], r"llama/tokenizer\.json: no such file"),
    "no end token": (edit("llama/tokenizer_config.json", eos_token=None), [], r"expected a vocabulary with <\|end\|> or an eos_token"),
    "Phi's template": (lambda _: None, ["chat_template=reasoning"], r"reasoning: chat_template: .*got a tokenizer without <\|assistant\|>; give a \.jinja file"),
    "template without an end": (endless, [], r"chatml\.jinja: chat_template: expected an end token of the tokenizer, '<\|im_end\|>'"),
    "no template": (without("chatml.jinja"), [], r"chatml\.jinja: expected a text file with a chat template: .*No such file"),
    "no reward": (without("reward.py"), [], r"rlvr\.reward .*reward\.py:coin: expected FILE\.py:FUNCTION"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_refused_before_anything_runs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    change, more, message = UNFIT[kind]
    words = write_own(tmp_path)
    change(tmp_path)
    assert main(["recipe", "tiny", *words, *more]) in (1, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if re.search(message, line)]
    assert len(said) == 1 and said[0].startswith(("NOT READY: ", "phimini: "))
    assert not (tmp_path / "run").exists()
