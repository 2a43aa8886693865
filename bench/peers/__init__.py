"""TRL's trainers beside our stages on the same task.

May import: kernels, model/*, parallel/*, stages/*, bench/gate.
"""
