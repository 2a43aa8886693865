"""Chat templates rendered exactly, and loss masks by position."""

from pathlib import Path

import pytest
from own_model_cases import CHATML
from tokenizer_cases import TEXTS, TINY, byte_level

from phimini.model.io.chat import (
    TEMPLATES,
    check_template,
    encode_example,
    encode_prompt,
    own_template,
    render,
    render_example,
    template_of,
)
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer

Q = {"role": "user", "content": "How to solve 3*x^2+4*x+5=1?"}
A = {"role": "assistant", "content": "So."}
S = {"role": "system", "content": "Be brief."}
TOOLS = {"role": "system", "content": "Use tools.", "tools": '[{"name": "add"}]'}
BUILT_IN = "<|system|>Your name is Phi, an AI math expert developed by Microsoft."


@pytest.mark.parametrize(
    ("template", "messages", "prompt", "text"),
    [
        ("instruct", [Q], True, "<|user|>How to solve 3*x^2+4*x+5=1?<|end|><|assistant|>"),
        ("instruct", [Q, A], False, "<|user|>How to solve 3*x^2+4*x+5=1?<|end|><|assistant|>So.<|end|><|endoftext|>"),
        ("instruct", [S, Q], True, "<|system|>Be brief.<|end|><|user|>How to solve 3*x^2+4*x+5=1?<|end|><|assistant|>"),
        ("instruct", [TOOLS], False, '<|system|>Use tools.<|tool|>[{"name": "add"}]<|/tool|><|end|><|endoftext|>'),
        # As Phi-4-mini-reasoning's model card prints it.
        ("reasoning", [Q], True, BUILT_IN + "<|end|><|user|>How to solve 3*x^2+4*x+5=1?<|end|><|assistant|>"),
        ("reasoning", [Q, A], False, BUILT_IN + "<|end|><|user|>How to solve 3*x^2+4*x+5=1?<|end|><|assistant|>So.<|end|><|endoftext|>"),
        ("reasoning", [S, Q], True, BUILT_IN + " Be brief.<|end|><|user|>How to solve 3*x^2+4*x+5=1?<|end|><|assistant|>"),
        ("reasoning", [TOOLS], False, BUILT_IN + ' Use tools.<|tool|>[{"name": "add"}]<|/tool|><|end|><|endoftext|>'),
    ],
)  # fmt: skip
def test_rendered_exactly(template, messages, prompt: bool, text: str) -> None:
    assert render(messages, template, add_generation_prompt=prompt) == text


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_transformers_renders_the_same(template, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TINY.save(tmp_path, chat_template=TEMPLATES[template])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in ([Q], [Q, A], [S, Q, A, Q], [TOOLS, Q]):
        for prompt in (True, False):
            want = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert render(messages, template, add_generation_prompt=prompt) == want


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_an_example_is_prompt_response_and_both_ends(template) -> None:
    question, response = "What is 4 + 5?", "<think>4+5=9</think>\\boxed{9}"
    ids, loss_from = encode_example(TINY, question, response, template)
    assert TINY.decode(ids) == render_example(question, response, template)
    assert ids[:loss_from] == encode_prompt(TINY, question, template)
    assert TINY.decode(ids[:loss_from]).endswith("<|end|><|assistant|>")
    assert TINY.decode(ids[loss_from:]) == response + "<|end|><|endoftext|>"
    assert ids[-2:] == [TINY.end_id, TINY.eos_id]


def test_loss_reaches_the_stop_tokens_although_pad_is_eos() -> None:
    ids, loss_from = encode_example(TINY, "1 + 1?", "2")
    pad = TINY.eos_id
    by_position = [loss_from <= i < len(ids) for i in range(len(ids))]
    padded = ids + [pad] * 3
    by_id = [i >= loss_from and t != pad for i, t in enumerate(padded)]  # the known mistake
    assert sum(by_position) == 3  # 2, <|end|>, <|endoftext|>
    assert by_position[-1] and not by_id[len(ids) - 1]


def test_a_responses_leading_space_is_kept() -> None:
    """In one text, <|assistant|> would swallow the space, and training would see a different sequence."""
    ids, loss_from = encode_example(TINY, "1 + 1?", "\n 2")
    assert TINY.decode(ids[loss_from:-2]) == "\n 2"
    assert ids != TINY.encode(render_example("1 + 1?", "\n 2"))


@pytest.mark.parametrize("token", ["<|end|>", "<|endoftext|>", "<|user|>"])
def test_control_tokens_in_data_are_refused(token: str) -> None:
    with pytest.raises(ValueError, match="question: expected plain text, got the control token"):
        encode_example(TINY, f"1{token}", "2")
    with pytest.raises(ValueError, match="response: expected plain text, got the control token"):
        encode_example(TINY, "1", f"2{token}3")
    ids, _ = encode_example(
        train_tiny_tokenizer([*TEXTS, "<|"]), "1", "2 <| 3"
    )  # only looks like one
    assert len(ids) > 5


def test_wrong_messages() -> None:
    with pytest.raises(ValueError, match="chat_template: expected one of .*got 'chatml'"):
        render([Q], "chatml")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="message 1: expected text under 'role' and 'content'"):
        render([Q, {"role": "user"}])


def test_another_models_vocabulary_has_its_own_template_and_end(tmp_path: Path) -> None:
    inner = byte_level(["<|im_start|>", "<|im_end|>"])
    other = Tokenizer(inner, {"eos_token": {"content": "<|im_end|>"}})
    assert other.stop_ids == (other.inner.token_to_id("<|im_end|>"),) * 2
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    other.save(tmp_path, chat_template=template)
    assert own_template(tmp_path, other := Tokenizer.load(tmp_path)) == template
    assert other.decode(encode_prompt(other, "Hello", template)) == "<|im_start|>Hello<|im_end|>"
    with pytest.raises(ValueError, match=r"for a Phi-4-mini vocabulary, got a tokenizer without <\|assistant\|>; give a .jinja file"):  # fmt: skip
        encode_prompt(other, "Hello", "instruct")


# --- templates of the user's own -----------------------------------------------------------------
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
PARTS = (
    "{% if tools is not none or documents %}{{ raise_exception('no tools') }}{% endif %}{% for m in messages %}\n"
    "{% if m['role'] == 'system' %}{% continue %}{% endif %}\n    {% set x = m['role'] | tojson %}{{ x }}{{ m['content'] }}</s>"
    '{% endfor %}{% if add_generation_prompt %}"assistant"{% endif %}'
)
EXAMPLE = ("What is 4 + 5?", " <think>\n4+5=9</think>\n\\boxed{9} ")


def llama_tokenizer(eos: str = "</s>") -> Tokenizer:
    """Return a vocabulary of all bytes with the control tokens of two families."""
    inner = byte_level(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(inner, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos})  # fmt: skip


@pytest.mark.parametrize(
    ("template", "eos", "answer_end"),
    [(CHATML, "<|im_end|>", "<|im_end|>"), (INST, "</s>", "</s>"), (PARTS, "</s>", "</s>")],
    ids=["ChatML", "bos and generation", "filters and loops"],
)  # fmt: skip
def test_an_own_template_is_rendered_and_masked_as_transformers_does(
    template: str, eos: str, answer_end: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = llama_tokenizer(eos)
    ours.save(tmp_path, chat_template=template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    question, response = EXAMPLE
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    apply = lambda some, prompt: theirs.apply_chat_template(
        some, add_generation_prompt=prompt, tokenize=False
    )
    assert render(messages, template, False, ours.named_tokens) == apply(messages, False)
    ids, loss_from = encode_example(ours, question, response, template)
    assert ids[:loss_from] == encode_prompt(ours, question, template)
    assert ours.decode(ids[:loss_from]) == apply(messages[:1], True)
    assert ours.decode(ids[loss_from:]) == response + answer_end
    assert ids[-1] in ours.stop_ids, "what follows the end token is never sampled"
    cut_off, _ = encode_example(ours, question, response, template, ended=False)
    assert ours.decode(cut_off) == apply(messages[:1], True) + response


UNFIT = {
    "thoughts dropped": (CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +"), r"begin with the prompt and the answer, .*think.*, got "),
    "answer trimmed": (CHATML.replace("m['content'] +", "m['content'].strip() +"), None),
    "prompt opens the thoughts": (CHATML.replace("assistant\n", "assistant\n<think>"), r"expected the whole conversation to begin with the prompt"),
    "no end": (CHATML.replace("<|im_end|>\n", "\n"), r"expected an end token of the tokenizer, '<\|im_end\|>', after the answer, got '\\n'"),
    "another end": (CHATML.replace("<|im_end|>", "</s>"), r"expected an end token of the tokenizer, '<\|im_end\|>', after the answer, got '</s>\\n'"),
    "the date": (CHATML + "{{ strftime_now('%d') }}", "expected a text that is the same every day, got strftime_now"),
    "refuses": (CHATML + "{{ raise_exception('too long') }}", "TemplateError: too long"),
    "user's error": (CHATML + "{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "unsafe": (CHATML + "{{ ().__class__.__base__.__subclasses__() }}", "SecurityError: "),
    "syntax": (CHATML + "{% if %}", "TemplateSyntaxError: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_a_template_that_does_not_fit_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    template, message = UNFIT[kind]
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    tokenizer = llama_tokenizer("<|im_end|>")
    if message is not None:
        with pytest.raises(ValueError, match=f"{file}: chat_template: .*{message}"):
            check_template(str(file), tokenizer)
        return
    check_template(str(file), tokenizer)  # only some answers have white space around them
    with pytest.raises(ValueError, match=r"begin with the prompt and the answer"):
        encode_example(tokenizer, *EXAMPLE, template)


def test_an_own_template_for_a_new_model_ends_with_its_tokens(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    with pytest.raises(ValueError, match=r"'<\|end\|>' or '<\|endoftext\|>', after the answer, got '<\|im_end\|>"):  # fmt: skip
        check_template(str(file))
    file.write_text(CHATML.replace("<|im_end|>", "<|end|>"))
    check_template(str(file))
    assert template_of(str(file)) == file.read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [("reasonin", "chat_template=reasonin: did you mean reasoning. expected one of instruct, reasoning or a .jinja file"),
     ("nowhere.jinja", r"chat_template=nowhere.jinja: expected a text file with a chat template: .*No such file")],
)  # fmt: skip
def test_a_template_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template_of(name)


def test_control_tokens_of_any_spelling_are_refused() -> None:
    with pytest.raises(ValueError, match="response: expected plain text, got the control token </s> in 'b</s>c'"):  # fmt: skip
        encode_example(llama_tokenizer(), "a", "b</s>c", INST)


def test_a_file_of_the_folder_has_precedence(tmp_path: Path) -> None:
    llama_tokenizer().save(tmp_path, chat_template=CHATML)
    (tmp_path / "chat_template.jinja").write_text(INST)
    assert Tokenizer.load(tmp_path).chat_template == INST
