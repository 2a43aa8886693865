"""Chat templates rendered exactly, and loss masks by position."""

from pathlib import Path

import pytest
from tokenizer_cases import TEXTS, TINY, byte_level

from phimini.model.io.chat import (
    TEMPLATES,
    encode_example,
    encode_prompt,
    own_template,
    render,
    render_example,
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
    with pytest.raises(ValueError, match="chat template: expected one of .*got 'chatml'"):
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
    with pytest.raises(ValueError, match=r"expected a Phi-4-mini vocabulary, got one without <\|assistant\|>"):  # fmt: skip
        encode_prompt(other, "Hello", "instruct")
