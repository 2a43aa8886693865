"""One optimizer step: batch, pipeline schedule, loss, gradients, update and checks for non-finite values.

May import: kernels/backend, model, parallel/attention, parallel/megatron, parallel/ranks.
"""
