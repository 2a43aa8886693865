"""A run as one frozen config, the recipes that build it, and the words of a command that override it.

May import: model.
"""
