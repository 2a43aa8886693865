"""Problems, prompts and rows, and their way into micro-batches: seeds, order and packing.

May import: model, model/io, parallel/ranks, parallel/training, stages/config, stages/verify.
"""
