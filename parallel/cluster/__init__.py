"""Job scripts for clusters, and checks of the ranks before a job starts.

May import: model, parallel/attention, parallel/ranks.
"""
