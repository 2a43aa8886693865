"""The report page of a run, and confidence intervals of accuracies.

May import: model/io.
"""
