"""The pages about a run and its data sets, and confidence intervals of accuracies.

May import: model/io, stages/config, stages/data, stages/run.
"""
