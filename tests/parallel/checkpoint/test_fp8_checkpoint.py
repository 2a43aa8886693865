"""Checkpoints of runs in FP8: fp32 masters go in and come out, into FP8 or not, on any layout; emulated, and by Transformer
Engine's real Python (`make test-te`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import run_ranks
from fp8_cases import CONFIG
from torch import Tensor

from phimini.parallel.checkpoint.save_load import load_checkpoint, save_checkpoint
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.fp8 import Fp8
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import Document, pack
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.training.step import forward_backward

ROOT = Path(__file__).parents[3]
TE = ROOT / "tests" / "support" / "te"
FOLDER = os.environ.get("PHIMINI_TE", "")
EMULATED = Fp8(recipe="blockwise", emulate=True)
TP2 = Layout(tensor=2)


def cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, batch: Any, *, group: Any) -> Any:
    """Cross-entropy over whole rows of the vocabulary, which each rank of `group` gathers."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    hidden_MD = copy_to_tensor_model_parallel_region(hidden_MD)
    logits_MV = gather_from_tensor_model_parallel_region(hidden_MD @ weight_VD.T)
    loss = F.cross_entropy(logits_MV, batch.targets_T, reduction="sum")
    return loss, torch.tensor(float(batch.num_tokens)), {}


def train(
    layout: Layout, fp8: Fp8 | None, dtype: torch.dtype, steps: int, load: Path | None, save: Path | None
) -> list[float]:  # fmt: skip
    """Return the losses of `steps` steps, from `load` or from the start; then `save`."""
    world = initialize(layout, CONFIG)
    model = build_model(CONFIG, world, seed=3, fp8=fp8, dtype=dtype)
    optimizer = build_optimizer(model, OptimizerConfig(lr=2e-3, warmup_steps=3, total_steps=30))
    done = 0 if load is None else load_checkpoint(load, model, optimizer)[0]
    losses = []
    for step in range(done, done + steps):
        starts = torch.randint(0, 90, (6,), generator=torch.Generator().manual_seed(step)).tolist()
        batch = pack([Document(tokens=[*range(a, a + 24)], targets=[*range(a + 1, a + 25)]) for a in starts])  # fmt: skip
        optimizer.zero_grad()
        losses.append(forward_backward(model, [batch], cross_entropy).loss)
        optimizer.step()
    if save is not None:
        save_checkpoint(save, done + steps, model, optimizer)
    return losses


def run(layout: Layout, fp8: Fp8 | None, steps: int, load: Path | None = None, save: Path | None = None,
        dtype: torch.dtype = torch.float32) -> list[float]:  # fmt: skip
    return run_ranks(train, layout.tensor, layout, fp8, dtype, steps, load, save, timeout_s=100)[0]


def test_emulated_fp8_goes_on_at_another_layout_and_in_fp32(tmp_path: Path) -> None:
    whole = run(TP2, EMULATED, 9)
    run(TP2, EMULATED, 6, save=tmp_path / "a")
    same = run(TP2, EMULATED, 3, load=tmp_path / "a")
    assert same == whole[6:], "uninterrupted, to the bit"
    # One rank sums in another order, and single values are rounded to the next step of the format.
    assert run(Layout(), EMULATED, 3, load=tmp_path / "a") == pytest.approx(whole[6:], rel=2e-3)
    # What was saved is fp32 whatever it was trained in: fp32 goes on the same on both layouts, close by.
    exact = run(Layout(), None, 3, load=tmp_path / "a", save=tmp_path / "b")
    assert run(TP2, None, 3, load=tmp_path / "a") == pytest.approx(exact, rel=1e-5)
    assert exact != whole[6:] and exact == pytest.approx(whole[6:], rel=0.02)
    # And back: what fp32 saved goes on in FP8.
    back = run(TP2, EMULATED, 1, load=tmp_path / "b")
    assert back != run(TP2, None, 1, load=tmp_path / "b")
    assert back == pytest.approx(run(Layout(), EMULATED, 1, load=tmp_path / "b"), rel=2e-3)


def test_bf16_weights_come_from_the_fp32_masters(tmp_path: Path) -> None:
    whole = run(TP2, EMULATED, 6, dtype=torch.bfloat16)
    run(TP2, EMULATED, 3, save=tmp_path / "a", dtype=torch.bfloat16)
    assert run(TP2, EMULATED, 3, load=tmp_path / "a", dtype=torch.bfloat16) == whole[3:]


# --- Transformer Engine's --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Run te_checkpoint.py; return the states of the ranks for each save and load."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(TE / "te_checkpoint.py"), FOLDER, str(tmp_path_factory.mktemp("te"))],
        env={**os.environ, "PYTHONPATH": f"{ROOT / '.path'}:{ROOT / 'tests/support'}:{os.environ.get('PYTHONPATH', '')}",
             "PYTHONHASHSEED": "0"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


LOADS_OF_FP8 = ["fp8 to fp8", "fp8 to tp2 to tp1", "fp8 to bf16", "fp8 to bf16 to fp8"]
LOADS_OF_BF16 = ["bf16 to fp8", "bf16 to fp8 to bf16"]


@pytest.mark.optin
@pytest.mark.skipif(not FOLDER, reason="PHIMINI_TE names no folder with Transformer Engine; `make test-te` does")  # fmt: skip
class TestReal:
    @pytest.mark.parametrize("load", [*LOADS_OF_FP8, *LOADS_OF_BF16])
    def test_masters_and_moments_come_back_to_the_bit(self, real: dict[str, Any], load: str) -> None:  # fmt: skip
        (want,), (got,) = real["fp8" if load in LOADS_OF_FP8 else "bf16"], real[load]
        for name, saved in want["state"].items():
            loaded = got["state"][name]
            for kind in ("master", "moments", "step"):
                assert loaded[kind] == saved[kind] != got["before"][name][kind], (name, kind)
            assert saved["step"] == 2

    @pytest.mark.parametrize("run", ["fp8", "bf16", "fp8 to tp2", *LOADS_OF_FP8, *LOADS_OF_BF16])
    def test_weights_are_the_masters_rounded_to_what_the_model_holds(self, real: dict[str, Any], run: str) -> None:  # fmt: skip
        """An FP8 checkpoint in a bf16 model has more than FP8's three bits of mantissa."""
        for rank in real[run]:
            assert all(p["master_rounds_to_weight"] for p in rank["state"].values())
            fp8 = {n for n, p in rank["state"].items() if p["class"] == "Float8Tensor"}
            assert len(fp8) == (0 if run.endswith("bf16") else 8)
            assert all(".layers.1." in n or ".layers.2." in n for n in fp8)

    @pytest.mark.parametrize("load", ["fp8 to fp8", "fp8 to tp2 to tp1", "fp8 to bf16 to fp8"])
    def test_weights_in_fp8_come_back_to_the_byte(self, real: dict[str, Any], load: str) -> None:
        (want,), (got,) = real["fp8"], real[load]
        assert {n: p["weight"] for n, p in got["state"].items()} == {
            n: p["weight"] for n, p in want["state"].items()
        }

    def test_nothing_is_in_the_extra_states_that_are_not_saved(self, real: dict[str, Any]) -> None:
        """The extra states of recipes without a history are empty, so omitting them is lossless in both directions."""
        (rank,) = real["fp8"]
        assert len(rank["extra"]) >= 16 and set(rank["extra"]) == {0}
