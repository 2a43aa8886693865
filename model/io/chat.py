"""Chat templates, and the encoding of a question and its answer into token ids with a loss mask.

A template is one of Phi-4-mini's two or any other's text. It is rendered as transformers' `apply_chat_template` does. In
Phi-4-mini's format a training example is `<|user|>Q<|end|><|assistant|>A<|end|><|endoftext|>`: no newlines, no bos, two
end tokens. The loss covers everything after the prompt, up to and with the last end token. It is marked by position: pad
and eos are one id, so a mask made from ids would drop the loss on the last token, and the model would never learn to stop.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimini.model.io.tokenizer import (
    END,
    EOS,
    NAMED_TOKENS,
    TEMPLATES,
    Tokenizer,
    around,
    train_tiny_tokenizer,
)
from phimini.model.suggest import nearest

ASSISTANT = "<|assistant|>"


class _Generation(Extension):
    """The block `{% generation %}`, with which transformers finds the assistant's words; its text is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


# The environment of transformers' apply_chat_template, without the clock: ids must not depend on the day.
_environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
_environment.filters["tojson"] = _to_json
_environment.globals["raise_exception"] = _raise_exception


@cache
def _compiled(template: str) -> Template:
    if "strftime_now" in template:
        raise ValueError("expected a text that is the same every day, got strftime_now")
    return _environment.from_string(template)


def template_of(name: str) -> str:
    """Return the text of a template by its name in TEMPLATES, or by the path of its .jinja file.

    Raises ValueError for another name, and for a file that is not there or not text.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja"):
        raise ValueError(f"chat_template={name}: {nearest(name, TEMPLATES)} or a .jinja file")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template={name}: expected a text file with a chat template: {error}"
        ) from error


def check_template(name: str, tokenizer: Tokenizer | None = None) -> None:
    """Make an example with a template, by its name or path, and a tokenizer; without one, with that of a new model.

    Raises ValueError that names the template and the reason if no training example can be made.
    """
    template, example = template_of(name), ("1 + 1?", "<think>\n1 + 1 = 2\n</think>\n\\boxed{2}")
    try:
        new = tokenizer or train_tiny_tokenizer([render_example(*example, template)])
        encode_example(new, *example, template)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def own_template(directory: Path, tokenizer: Tokenizer) -> str:
    """Return the text of the chat template in a Hugging Face folder.

    Raises ValueError if it has none, or one that does not turn a question into text.
    """
    try:
        text = tokenizer.chat_template
        render([{"role": "user", "content": "?"}], text, True, tokenizer.named_tokens)
    except ValueError as error:
        raise ValueError(f"{directory / 'tokenizer_config.json'}: {error}") from error
    return text


def render(
    messages: Sequence[dict[str, Any]],
    template: str = "instruct",
    add_generation_prompt: bool = False,
    named_tokens: Mapping[str, str] = NAMED_TOKENS,
) -> str:
    """Return the text of a conversation. A message has `role`, `content` and, if from the system, maybe `tools`.

    template: a name of TEMPLATES or a template's own text. named_tokens: its `eos_token` and the like. Raises ValueError for
    another name, and with the words of a template that cannot be rendered.
    """
    if template not in TEMPLATES and "{" not in template:
        raise ValueError(
            f"chat_template: expected one of {sorted(TEMPLATES)}, got {template!r:.60}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {i}: expected text under 'role' and 'content', got {message!r}"
            )
    try:
        return _compiled(TEMPLATES.get(template, template)).render(
            messages=messages, tools=None, documents=None,
            add_generation_prompt=add_generation_prompt, **named_tokens,
        )  # fmt: skip
    # A template is the user's code, which may raise any kind of error.
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"chat_template: {kind}{error}") from error


def render_example(
    question: str,
    response: str,
    template: str = "instruct",
    named_tokens: Mapping[str, str] = NAMED_TOKENS,
) -> str:
    """Return the text that `encode_example` turns into ids, with what a template writes after the last end token."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return render(messages, template, named_tokens=named_tokens)


def _render_prompt(tokenizer: Tokenizer, question: str, template: str) -> str:
    messages = [{"role": "user", "content": question}]
    return render(messages, template, True, tokenizer.named_tokens)


def encode_prompt(tokenizer: Tokenizer, question: str, template: str = "instruct") -> list[int]:
    """Return the ids of the prompt, up to the answer. template: as for `render`."""
    check_plain(tokenizer.special_tokens, "question", question)
    if template in TEMPLATES or template in TEMPLATES.values():
        for token in (ASSISTANT, END, EOS):
            if tokenizer.inner.token_to_id(token) is None:
                raise ValueError(
                    f"chat_template: Phi-4-mini's is for a Phi-4-mini vocabulary, got a tokenizer without {token}; "
                    "give a .jinja file with the format of this tokenizer"
                )
    return tokenizer.encode(_render_prompt(tokenizer, question, template))


def encode_example(
    tokenizer: Tokenizer,
    question: str,
    response: str,
    template: str = "instruct",
    *,
    ended: bool = True,
) -> tuple[list[int], int]:
    """Return (ids, loss_from) of prompt, response and what ends it, in Phi-4-mini's format `<|end|>`, `<|endoftext|>`.

    The loss covers ids[loss_from:]. `ended=False` is for a response that was cut off: it gets no end tokens.

    The response is encoded separately, as a model would write it. In one text with the prompt, `<|assistant|>` would
    swallow its leading white space. Raises ValueError for text that contains a control token, and for a template that
    changes the prompt or the response when it renders both, or writes no end token after them.
    """
    prompt = encode_prompt(tokenizer, question, template)
    check_plain(tokenizer.special_tokens, "response", response)
    ids = prompt + tokenizer.encode(response)
    if ended:
        ids += _encode_end(tokenizer, question, response, template)
    return ids, len(prompt)


def _encode_end(tokenizer: Tokenizer, question: str, response: str, template: str) -> list[int]:
    """Return the ids of what the template writes after the response, up to the last end token: no more can be sampled."""
    begun = _render_prompt(tokenizer, question, template) + response
    whole = render_example(question, response, template, tokenizer.named_tokens)
    if not whole.startswith(begun):
        place = max(len(os.path.commonprefix([whole, begun])) - 20, 0)
        raise ValueError(
            "chat_template: expected the whole conversation to begin with the prompt and the answer, "
            f"{begun[place : place + 50]!r}, got {whole[place : place + 50]!r}"
        )
    ids = tokenizer.encode(whole[len(begun) :])
    ends = [place for place, token in enumerate(ids) if token in tokenizer.stop_ids]
    if not ends:
        known = " or ".join(dict.fromkeys(map(repr, (tokenizer.decode([i]) for i in tokenizer.stop_ids))))  # fmt: skip
        raise ValueError(
            f"chat_template: expected an end token of the tokenizer, {known}, after the answer, got {whole[len(begun) :]!r:.60}"
        )
    return ids[: ends[-1] + 1]


def check_plain(special_tokens: Collection[str], field: str, text: str) -> None:
    """Raise ValueError that names the field if its text contains a control token."""
    for token in sorted(special_tokens):
        if token in text:
            raise ValueError(
                f"{field}: expected plain text, got the control token {token} in {around(text, token)!r}"
            )
