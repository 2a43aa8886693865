"""Transformer Engine's layers in our model: its real Python with the compiled half replaced (`make test-te`), and what was
recorded from it (te_recorded.json), which needs nothing and so is checked every time. Numbers need a GPU.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import te_stub
import torch

from phimini.model.config import ModelConfig
from phimini.parallel.megatron.fp8 import ALIGNMENT
from phimini.parallel.megatron.weight_names import LAYER_NAMES, hf_names, merge_shards, take_shard

ROOT = Path(__file__).parents[3]
TE = ROOT / "tests" / "support" / "te"
RECORDED = json.loads((TE / "te_recorded.json").read_text())
FOLDER = os.environ.get("PHIMINI_TE", "")
CONFIG = ModelConfig(
    num_layers=4, model_dim=256, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=512, vocab_size=128,
    max_positions=512, original_max_positions=512,
)  # fmt: skip
LAYOUTS = {"tp1": 1, "tp2": 2, "tp2 sp": 2}
FP8_RUNS = {
    "blockwise tp1": "Float8BlockScaling", "blockwise tp2": "Float8BlockScaling", "blockwise tp2 sp": "Float8BlockScaling",
    "tensorwise tp2 sp": "Float8CurrentScaling", "mxfp8 tp2 sp": "MXFP8BlockScaling",
}  # fmt: skip


# --- what was recorded ---------------------------------------------------------------------------
def signature(name: str) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(
                parameter,
                getattr(inspect.Parameter, kind),
                default=inspect.Parameter.empty if needed else None,
            )
            for parameter, kind, needed in RECORDED["signatures"][name]
        ]
    )


def calls(file: str, inside: str, function: str) -> Iterator[ast.Call]:
    """Return the calls of `function` (its last name) in class or function `inside` of a file of megatron-core."""
    tree = ast.parse((Path(megatron.core.__file__).parent / file).read_text())
    for scope in ast.walk(tree):
        if isinstance(scope, ast.ClassDef | ast.FunctionDef) and scope.name == inside:
            for node in ast.walk(scope):
                if isinstance(node, ast.Call):
                    called = node.func
                    if (
                        called.attr
                        if isinstance(called, ast.Attribute)
                        else getattr(called, "id", "")
                    ) == function:
                        yield node


TE_FILE = "extensions/transformer_engine.py"
CALL_SITES = [
    (TE_FILE, "TELayerNormColumnParallelLinear", "__init__", "LayerNormLinear"),
    (TE_FILE, "TELayerNormColumnParallelLinear", "forward", "LayerNormLinear.forward"),
    (TE_FILE, "TELinear", "__init__", "Linear"),
    (TE_FILE, "TELinear", "forward", "Linear.forward"),
    ("fp8_utils.py", "get_fp8_context", "fp8_autocast", "fp8_autocast"),
    ("fp8_utils.py", "get_fp8_recipe", "Float8CurrentScaling", "Float8CurrentScaling"),
    ("fp8_utils.py", "get_fp8_recipe", "Float8BlockScaling", "Float8BlockScaling"),
    ("fp8_utils.py", "get_fp8_recipe", "MXFP8BlockScaling", "MXFP8BlockScaling"),
]


@pytest.mark.parametrize(("file", "inside", "function", "name"), CALL_SITES, ids=lambda v: v)
def test_megatron_calls_transformer_engine_with_arguments_that_it_has(
    file: str, inside: str, function: str, name: str
) -> None:
    found = list(calls(file, inside, function))
    assert found, f"{file}: {inside} no longer calls {function}"
    for call in found:
        method = ["self"] if function in ("__init__", "forward") else []
        positional = [*method, *map(ast.unparse, call.args)]
        given = {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg is not None}
        signature(name).bind(*positional, **given)
        with pytest.raises(TypeError, match="no_such_argument"):
            signature(name).bind(*positional, **given, no_such_argument="")


@pytest.mark.parametrize(("layout", "size"), LAYOUTS.items(), ids=LAYOUTS)
def test_its_parameters_have_hugging_face_names_and_shards(layout: str, size: int) -> None:
    whole = hf_names(CONFIG)
    parameters = RECORDED["parameters"][layout]
    seen = set()
    for name, (shape, partition_dim, sequence_parallel) in parameters.items():
        layer, _, rest = name.partition(".")
        suffix, split = LAYER_NAMES[rest]
        hf_name = f"model.layers.{layer}.{suffix}"
        tensor = torch.randn(whole[hf_name])
        shards = [take_shard(tensor, split, rank, size, CONFIG) for rank in range(size)]
        assert [list(shard.shape) for shard in shards] == [shape] * size, name
        assert merge_shards(torch.stack(shards), split, CONFIG).equal(tensor), name
        split_dim = {"whole": None, "qkv": 0, "gate_up": 0, "columns": 1}[split]
        assert partition_dim == split_dim, name
        # Megatron sums the gradient of a norm's weight over the ranks that share a sequence only if it is marked.
        assert sequence_parallel == (layout.endswith("sp") and split == "whole"), name
        seen.add(hf_name)
    assert seen == {name for name in whole if ".layers." in name}


# --- the real Python -----------------------------------------------------------------------------
real = [
    pytest.mark.optin,
    pytest.mark.skipif(not FOLDER, reason="PHIMINI_TE names no folder with Transformer Engine; `make test-te` does"),
]  # fmt: skip


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Return the findings of te_build.py, whose process imports Transformer Engine before Megatron."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(TE / "te_build.py"), FOLDER],
        env={**os.environ, "PYTHONPATH": f"{ROOT / '.path'}:{ROOT / 'tests/support'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def recorded(built: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": te_stub.VERSION,
        "signatures": built["signatures"],
        "parameters": {layout: built[f"blockwise {layout}"][0]["parameters"] for layout in LAYOUTS},
    }


class TestReal:
    pytestmark = real

    def test_the_record_is_what_the_real_one_says(self, built: dict[str, Any]) -> None:
        """After a new version, write `json.dump(recorded(built), ...)` and read the difference."""
        assert recorded(built) == RECORDED

    @pytest.mark.parametrize("run", FP8_RUNS)
    def test_a_step_is_the_plain_models(self, built: dict[str, Any], run: str) -> None:
        """With each linear computed in fp32 by a double: the norms are inside it, once, and the shards are right."""
        plain = built[f"plain {run.partition(' ')[2]}"]
        for want, got in zip(plain, built[run], strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["gradients"] == pytest.approx(want["gradients"], rel=1e-4)
            assert got["norms"] == ["NoNorm"] * 2
            assert got["head"] == "megatron.core.tensor_parallel.layers", "the head is not its"

    @pytest.mark.parametrize("run", FP8_RUNS)
    def test_weights_come_back_from_its_names(self, built: dict[str, Any], run: str) -> None:
        assert [rank["round_trip"] for rank in built[run]] == [[]] * len(built[run])

    @pytest.mark.parametrize(("run", "recipe"), FP8_RUNS.items())
    def test_the_middle_layers_compute_by_the_recipe(
        self, built: dict[str, Any], run: str, recipe: str
    ) -> None:
        for rank in built[run]:
            assert [call["recipe"] for call in rank["calls"]] == [None] * 4 + [recipe] * 8 + [
                None
            ] * 4
            for call in rank["calls"][4:12]:
                # e4m3 forward, and e5m2 backward only under one scale for a tensor
                assert call["format"] == ("HYBRID" if run.startswith("tensorwise") else "E4M3")
                assert call["group"] == LAYOUTS[run.partition(" ")[2]], "the ranks that reduce amax"
                assert call["shape"][0] % ALIGNMENT[run.split()[0]] == 0, "a rank's own tokens"  # pyright: ignore[reportArgumentType]
                assert call["shape"][-1] == call["weight"][-1]

    def test_recomputing_goes_through_its_own_checkpoint(self, built: dict[str, Any]) -> None:
        (got,), (want,) = built["recomputed full"], built["plain tp1"]
        assert len(got["calls"]) == 32  # each linear twice
        assert got["gradients"] == pytest.approx(want["gradients"], rel=1e-4)

    def test_selective_recomputation_makes_swiglu_again(self, built: dict[str, Any]) -> None:
        (got,), (want,) = built["recomputed selective"], built["plain tp1"]
        assert len(got["calls"]) == 16 and (want["swiglu_calls"], got["swiglu_calls"]) == (4, 8)
        assert got["gradients"] == pytest.approx(want["gradients"], rel=1e-4)
        # They are told to save what they are given, not a copy of their own in FP8.
        saving = [
            f"{n}.{name}"
            for n in range(4)
            for name in ("mlp.linear_fc2", "self_attention.linear_proj")
        ]
        assert got["saves_inputs"] == saving and want["saves_inputs"] == []

    def test_weights_are_kept_in_fp8_under_zero1_between_first_and_last_layer(
        self, built: dict[str, Any]
    ) -> None:
        kept = built["weights zero1=True rounding=False"]
        assert kept["made"] == [False] * 4 + [True] * 8 + [False] * 4 and kept["gathered"]
        plain = built["weights zero1=False rounding=False"]
        assert plain["made"] == [False] * 16 and not plain["gathered"]

    def test_what_is_compiled_is_refused(self, built: dict[str, Any]) -> None:
        """The stub invents no results: the first rounding of a weight is an error that names the function."""
        error = built["weights zero1=True rounding=True"]["error"]
        assert error.startswith("transformer_engine_torch.quantize was called")
