"""Parts that every training stage shares: its folder, resume, log, loading and saving.

May import: kernels, model, model/io, parallel/attention, parallel/checkpoint, parallel/megatron, parallel/plan, parallel/ranks, parallel/training, stages/config, stages/data.
"""
