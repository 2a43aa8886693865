"""Problems, prompts and rows, and the packing of examples into micro-batches.

May import: model, parallel/ranks, parallel/training, stages/config, stages/verify.
"""
