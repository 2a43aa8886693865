"""A stage's model as others use it: its model card, and its way to the Hugging Face Hub.

May import: model, model/io, stages/benchmarks, stages/config, stages/report, stages/run.
"""
