"""Published benchmarks of any model: questions, journalled samples, both verdicts, scores with intervals, and their comparison.

May import: model, model/io, parallel/ranks, stages/config, stages/data, stages/report, stages/rollout, stages/run, stages/verify.
"""
