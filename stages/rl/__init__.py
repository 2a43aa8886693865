"""Parts of stage 4: scored groups, the paper's remedies, the policy loss, and sampler-trainer mismatch.

May import: kernels, model, model/io, parallel/checkpoint, parallel/megatron, parallel/ranks, parallel/training, parallel/weight_sync, stages/config, stages/data, stages/rollout, stages/run, stages/verify.
"""
