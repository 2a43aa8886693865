"""A run as one frozen config, the recipes that build it, and its seeds.

May import: model.
"""
