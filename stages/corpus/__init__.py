"""Steps over the rollouts of a corpus, in process for `distill` or as datatrove's blocks for `clean`: local tasks or job arrays.

May import: model/io, parallel/ranks, stages/benchmarks, stages/config, stages/data, stages/run, stages/verify.
"""
