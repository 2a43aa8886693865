"""The command `phimini bench` and the page of results that it writes.

May import: model, model/io, parallel/ranks, stages, stages/run, bench/gate, bench/peers.
"""
