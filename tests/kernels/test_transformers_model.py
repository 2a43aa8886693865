"""`apply_to`: a transformers Phi3ForCausalLM has the same losses, gradients and answers with our ops."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from phimini.kernels import apply_to

IGNORE = -100


def phi3(dtype: torch.dtype = torch.float32, **changes) -> Any:
    settings: dict[str, Any] = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=64,
        partial_rotary_factor=0.75, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Phi3ForCausalLM(Phi3Config(**(settings | changes)))
    return model.to(dtype)


def batch() -> dict[str, Tensor]:
    """Two rows; the second is padded on the right."""
    ids, mask = torch.randint(3, 97, (2, 11)), torch.ones(2, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    labels = ids.where(mask.bool(), IGNORE)
    labels[:, :3] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model: Any, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("items", [None, 23])
@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_are_the_same(tied: bool, items: int | None) -> None:
    model, inputs = phi3(torch.float64, tie_word_embeddings=tied), batch()
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    ours = apply_to(copy.deepcopy(model))
    want_loss, want = loss_and_gradients(model, **inputs)
    got_loss, got = loss_and_gradients(ours, **inputs)
    # transformers computes norm and loss in fp32, whatever the model's dtype
    torch.testing.assert_close(got_loss, want_loss.to(got_loss.dtype), rtol=1e-6, atol=1e-6)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


def test_positions_restart_in_packed_rows() -> None:
    model, ids = phi3(), torch.randint(3, 97, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    want, _ = loss_and_gradients(copy.deepcopy(model), **inputs)
    got, _ = loss_and_gradients(apply_to(model), **inputs)
    torch.testing.assert_close(got, want)


def test_generation_is_the_same_and_no_other_model_changes() -> None:
    model, ids = phi3(), torch.randint(3, 97, (2, 5))
    other, before = copy.deepcopy(model), type(model).forward
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    apply_to(model)
    got = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, want)
    logits = model(ids).logits
    assert logits is not None and model(ids, labels=ids).logits is None
    torch.testing.assert_close(other(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert other(ids, labels=ids).logits is not None and type(model).forward is before


def zeros(op: Callable) -> Callable:
    """Return `op` with zeros for results."""

    def planted(*args, **options) -> Any:
        result = op(*args, **options)
        return result * 0 if isinstance(result, Tensor) else tuple(x * 0 for x in result)

    return planted


def test_each_op_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an op that gives zeros changes the loss, so transformers' own code is not left in place."""
    from phimini.kernels import transformers_model as patched

    inputs = batch()
    want, _ = loss_and_gradients(apply_to(phi3()), **inputs)
    for name in ("rms_norm", "swiglu", "rope"):
        op = getattr(patched, name)
        with monkeypatch.context() as changed:
            changed.setattr(patched, name, zeros(op))
            got, _ = loss_and_gradients(apply_to(phi3()), **inputs)
        assert abs(float(got - want)) > 1e-3, name


def test_other_models_are_refused() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected a transformers Phi3ForCausalLM, got Llama"):
        apply_to(llama)
    with pytest.raises(ValueError, match="expected hidden_act silu, got 'gelu'"):
        apply_to(phi3(hidden_act="gelu"))
