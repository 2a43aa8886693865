"""A random Llama with a vocabulary of bytes and the ChatML format, and rows, reward and settings of a run from it."""

from pathlib import Path

import torch
from tokenizer_cases import byte_level

from phimini.model.io.json_files import write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.data.arithmetic_problems import generate_problems, teach

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWARD = """
def coin(question: str, answer: str, response: str, finish_reason: str) -> float:
    return 1.0 if len(response) % 2 else -1.0
"""
STAGES = [
    "processes=1", "distill.num_heldout=4", "distill.num_validation=4", "distill.num_prompts=8", "curate.sft_examples=8",
    "midtrain.steps=3", "midtrain.sequence_length=512", "midtrain.rows_per_step=2", "midtrain.validate_every=3",
    "sft.epochs=1", "sft.examples_per_step=4", "sft.sequence_length=512", "sft.validate_every=2",
    "rollout_dpo.pairs=policy", "rollout_dpo.num_prompts=8", "rollout_dpo.max_new_tokens=16", "rollout_dpo.pairs_per_step=4", "rollout_dpo.epochs=1", "rollout_dpo.sequence_length=512",
    "rlvr.steps=2", "rlvr.prompts_per_step=2", "rlvr.rollouts_per_prompt=4", "rlvr.probe_prompts=8", "rlvr.oversample_to=8",
    "rlvr.max_new_tokens=16", "rlvr.sequence_length=512", "rlvr.min_rollouts=2", "rlvr.max_accuracy=0.9",
    "evaluate.max_new_tokens=16",
]  # fmt: skip


def write_own(folder: Path) -> list[str]:
    """Write model, template, reward and rows into the folder, and return the words of a run from them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    inner = byte_level(["<s>", "<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}  # fmt: skip
    Tokenizer(inner, named).save(folder / "llama")
    (folder / "chatml.jinja").write_text(CHATML)
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {"id": f"{p.id}/{k}", "question": p.question, "answer": p.answer, "response": teach(p, k, quick=0.9, slip=0.4)}
        for p in generate_problems(5, 40)
        for k in range(4)
    ]  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    return [
        f"model={folder}/llama/config.json", f"base={folder}/llama", f"chat_template={folder}/chatml.jinja",
        f"distill.source={folder}/rows.jsonl", f"rlvr.reward={folder}/reward.py:coin", f"out={folder}/run", *STAGES,
    ]  # fmt: skip
