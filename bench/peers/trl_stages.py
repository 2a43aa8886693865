"""TRL's side of `phimini bench peers`: a script for an environment without megatron-core.

    python trl_stages.py sft|dpo|grpo FOLDER STEPS

Writes a JSON line when it is ready, then one for every line `go` on stdin, as `command.py` expects.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
import json
import re
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

WARM_UP = 2
PACKAGES = ("trl", "transformers", "accelerate", "torch")


class Turns(TrainerCallback):
    """Run `steps` optimizer steps per `go`, after WARM_UP uncounted steps."""

    def __init__(self, steps: int, units: int, first_loss: float) -> None:
        self.steps, self.units, self.first_loss = steps, units, first_loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step - WARM_UP
        if done < 0 or done % self.steps:
            return
        if done:
            self.say(cpu_seconds=time.process_time() - self.since, units=self.units * self.steps)
        else:
            self.say(first_loss=self.first_loss, versions={p: version(p) for p in PACKAGES})
        if sys.stdin.readline().strip() != "go":
            sys.exit(0)
        self.since = time.process_time()

    def say(self, **values: Any) -> None:
        values["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("PEERS " + json.dumps(values), flush=True)


class TokenizedDPO(DPOTrainer):
    """A DPO trainer that keeps the rows' token ids, which are those of the other side."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def model_of(folder: Path) -> Phi3ForCausalLM:
    return Phi3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>", pad_token="<|endoftext|>", padding_side="left"
    )  # fmt: skip


def main(task: str, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    settings = json.loads((folder / "settings.json").read_text())
    common: dict[str, Any] = dict(
        output_dir=str(folder / "trl"), max_steps=10**6, report_to=[], save_strategy="no", logging_steps=10**6,
        use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, dataloader_num_workers=0,
        disable_tqdm=True, learning_rate=1e-5, weight_decay=0.1, max_grad_norm=1.0,
    )  # fmt: skip
    batch = settings["batch"]
    trainer, loss = {"sft": sft, "dpo": dpo, "grpo": grpo}[task](folder, rows, settings, common)
    units = settings["tokens_per_step"] if task == "sft" else batch
    trainer.add_callback(Turns(steps, units, loss))
    trainer.train()


def sft(folder: Path, rows: list, settings: dict, common: dict) -> tuple[Any, float]:
    config = SFTConfig(per_device_train_batch_size=settings["batch"], max_length=None, **common)
    trainer = SFTTrainer(
        model=model_of(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(folder / "model"),
    )
    return trainer, first_loss(trainer, settings["batch"])


def dpo(folder: Path, rows: list, settings: dict, common: dict) -> tuple[Any, float]:
    config = DPOConfig(
        per_device_train_batch_size=settings["batch"],
        beta=settings["beta"],
        max_length=None,
        **common,
    )
    trainer = TokenizedDPO(
        model=model_of(folder / "model"),
        ref_model=model_of(folder / "reference"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(folder / "model"),
    )
    return trainer, first_loss(trainer, settings["batch"])


def first_loss(trainer: Any, batch: int) -> float:
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(batch)])
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, dict(inputs)))


def grpo(folder: Path, rows: list, settings: dict, common: dict) -> tuple[Any, float]:
    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        boxed = [re.findall(r"\\boxed\{([^{}]*)\}", text) for text in completions]
        return [1.0 if b and b[-1] == a else -1.0 for b, a in zip(boxed, answer, strict=True)]

    config = GRPOConfig(
        per_device_train_batch_size=settings["batch"], num_generations=settings["group"],
        max_completion_length=settings["max_new_tokens"], temperature=1.0, beta=0.0, epsilon=0.2, epsilon_high=0.28,
        loss_type="dapo", use_vllm=False, **common,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model_of(folder / "model"),
        args=config,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(folder / "model"),
    )
    given = json.loads((folder / "grpo_batch.json").read_text())
    trainer.model.eval()  # TRL's train mode counts accumulation steps before they begin; the model has no dropout
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, padded(given)))
    trainer.model.train()
    return trainer, loss


def padded(rollouts: list[dict]) -> dict[str, torch.Tensor]:
    """Return TRL's batch: prompts padded on the left, completions on the right."""
    P, C = max(len(r["prompt"]) for r in rollouts), max(len(r["response"]) for r in rollouts)
    left = lambda ids: [0] * (P - len(ids)) + ids
    right = lambda values: values + [0] * (C - len(values))
    return {
        "prompt_ids": torch.tensor([left(r["prompt"]) for r in rollouts]),
        "prompt_mask": torch.tensor([left([1] * len(r["prompt"])) for r in rollouts]),
        "completion_ids": torch.tensor([right(r["response"]) for r in rollouts]),
        "completion_mask": torch.tensor([right([1] * len(r["response"])) for r in rollouts]),
        "old_per_token_logps": torch.tensor([right(r["old_logps"]) for r in rollouts]),
        "advantages": torch.tensor([r["advantage"] for r in rollouts]),
        "num_items_in_batch": torch.tensor(sum(len(r["response"]) for r in rollouts)),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
