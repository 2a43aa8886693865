"""Finished experiments behind tables of results.

May import: model/*, parallel/*, stages/*.
"""
