"""The small config of the FP8 tests."""

from phimini.model.config import ModelConfig

# --- in the model --------------------------------------------------------------------------------
CONFIG = ModelConfig(
    num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=256, vocab_size=128,
    max_positions=256, original_max_positions=256,
)  # fmt: skip
