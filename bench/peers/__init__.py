"""Other trainers beside ours on the same task.

May import: kernels, model/*, parallel/*, stages/*, bench/gate, bench/system.
"""
