"""Checks of a machine, a recipe and its base model before a run, on one page: `phimini doctor RECIPE`.

May import: kernels, model, model/io, parallel/attention, parallel/megatron, parallel/ranks, parallel/training, stages/config, stages/data, stages/rollout, stages/run.
"""
