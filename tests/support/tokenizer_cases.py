"""Texts and a small tokenizer that several tests encode."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from phimini.model.io.tokenizer import train_tiny_tokenizer

TEXTS = [
    "<|user|>What is 47 + 385?<|end|><|assistant|><think>47+385:7+5=12,4+8+1=13,0+3+1=4;=432</think>\\boxed{432}<|end|>",
    "<|user|>Solve 3x - 4 = 11 for x.<|end|><|assistant|><think>3x=15\nx=5</think>\\boxed{5}<|end|>",
    "<|user|>Tom has 12 apples and buys 3 boxes of 5. How many apples does he have?<|end|>",
] * 5


TINY = train_tiny_tokenizer(TEXTS)


def byte_level(special: Sequence[str]) -> Tokenizer:
    """Return a vocabulary of all bytes, as in Phi-4-mini's tokenizer, with these control tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["a"], trainer)
    made.add_special_tokens(list(special))
    return made
