"""Phi-4-mini's two chat templates, a folder's own one, and the encoding of a question and its answer into token ids with a loss mask.

A training example is `<|user|>Q<|end|><|assistant|>A<|end|><|endoftext|>`: no newlines, no bos, two end tokens.
The loss covers everything after `<|assistant|>`, with both end tokens. It is marked by position: pad and eos are one
id, so a mask made from ids would drop the loss on the last token, and the model would never learn to stop.
"""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimini.model.io.tokenizer import EOS, Tokenizer, around

ASSISTANT = "<|assistant|>"
TemplateName = Literal["instruct", "reasoning"]

# As shipped in tokenizer_config.json of microsoft/Phi-4-mini-instruct and microsoft/Phi-4-mini-reasoning.
TEMPLATES: dict[str, str] = {
    "instruct": (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
        "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + "
        "message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + "
        "message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "reasoning": (
        "{{ '<|system|>Your name is Phi, an AI math expert developed by Microsoft.' }}"
        "{% for message in messages %}{% if message['role'] == 'system' %} {{ message['content'] }}"
        "{% if 'tools' in message and message['tools'] is not none %}{{ '<|tool|>' + message['tools'] + "
        "'<|/tool|>' }}{% endif %}{% endif %}{% endfor %}{{ '<|end|>' }}{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}"
        "{% endif %}"
    ),
}
# The environment of transformers' apply_chat_template.
_environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


@cache
def _compiled(template: str) -> Template:
    return _environment.from_string(TEMPLATES.get(template, template))


def own_template(directory: Path, tokenizer: Tokenizer) -> str:
    """Return the text of the chat template in a Hugging Face folder.

    Raises ValueError if it has none, or one that does not turn a question into text.
    """
    file, path = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    text = file.read_text() if file.is_file() else tokenizer.config.get("chat_template")
    if not isinstance(text, str) or "{" not in text:
        raise ValueError(
            f"{path}: chat_template: expected the text of a chat template, here or in {file.name}, got {text!r:.60}"
        )
    try:
        render([{"role": "user", "content": "?"}], text, True)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{path}: chat_template: {type(error).__name__}: {error}") from error
    return text


def render(
    messages: Sequence[dict[str, Any]],
    template: str = "instruct",
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a conversation. A message has `role`, `content` and, if from the system, maybe `tools`.

    template: a name of TEMPLATES or a template's own text. Raises ValueError for another name.
    """
    if template not in TEMPLATES and "{" not in template:
        raise ValueError(f"chat template: expected one of {sorted(TEMPLATES)}, got {template!r}")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {i}: expected text under 'role' and 'content', got {message!r}"
            )
    return _compiled(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, eos_token=EOS
    )


def render_example(question: str, response: str, template: TemplateName = "instruct") -> str:
    """Return the text that `encode_example` turns into ids."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return render(messages, template)


def encode_prompt(tokenizer: Tokenizer, question: str, template: str = "instruct") -> list[int]:
    """Return the ids of the prompt, up to and with `<|assistant|>`. template: as for `render`."""
    check_plain(tokenizer.special_tokens, "question", question)
    if template in TEMPLATES and tokenizer.inner.token_to_id(ASSISTANT) is None:
        raise ValueError(
            f"tokenizer: expected a Phi-4-mini vocabulary, got one without {ASSISTANT}"
        )
    messages = [{"role": "user", "content": question}]
    return tokenizer.encode(render(messages, template, add_generation_prompt=True))


def encode_example(
    tokenizer: Tokenizer,
    question: str,
    response: str,
    template: TemplateName = "instruct",
    *,
    ended: bool = True,
) -> tuple[list[int], int]:
    """Return (ids, loss_from) of prompt, response, `<|end|>`, `<|endoftext|>`; the loss covers ids[loss_from:].

    `ended=False` is for a response that was cut off: it gets no end tokens.

    The response is encoded separately, as a model would write it. In one text with the prompt, `<|assistant|>` would
    swallow its leading white space. Raises ValueError for text that contains a control token.
    """
    prompt = encode_prompt(tokenizer, question, template)
    check_plain(tokenizer.special_tokens, "response", response)
    end = [tokenizer.end_id, tokenizer.eos_id] if ended else []
    return prompt + tokenizer.encode(response) + end, len(prompt)


def check_plain(special_tokens: Collection[str], field: str, text: str) -> None:
    """Raise ValueError that names the field if its text contains a control token."""
    if "<|" in text:
        for token in sorted(special_tokens):
            if token in text:
                raise ValueError(
                    f"{field}: expected plain text, got the control token {token} in {around(text, token)!r}"
                )
