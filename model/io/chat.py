"""Phi-4-mini's two chat templates, and the encoding of a question and its answer into token ids with a loss mask.

A training example is `<|user|>Q<|end|><|assistant|>A<|end|><|endoftext|>`: no newlines, no bos, two end tokens.
The loss covers everything after `<|assistant|>`, with both end tokens. It is marked by position: pad and eos are one
id, so a mask made from ids would drop the loss on the last token, and the model would never learn to stop.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimini.model.io.tokenizer import EOS, Tokenizer, around

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
_compiled = {name: _environment.from_string(text) for name, text in TEMPLATES.items()}


def render(
    messages: Sequence[dict[str, str]],
    template: TemplateName = "instruct",
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a conversation. A message has `role`, `content` and, if from the system, maybe `tools`."""
    if template not in TEMPLATES:
        raise ValueError(f"chat template: expected one of {sorted(TEMPLATES)}, got {template!r}")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {i}: expected text under 'role' and 'content', got {message!r}"
            )
    return _compiled[template].render(
        messages=messages, add_generation_prompt=add_generation_prompt, eos_token=EOS
    )


def render_example(question: str, response: str, template: TemplateName = "instruct") -> str:
    """Return the text that `encode_example` turns into ids."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return render(messages, template)


def encode_prompt(
    tokenizer: Tokenizer, question: str, template: TemplateName = "instruct"
) -> list[int]:
    """Return the ids of the prompt, up to and with `<|assistant|>`."""
    check_plain(tokenizer.special_tokens, "question", question)
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
