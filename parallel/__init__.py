"""Megatron-core, for every device: on a machine without CUDA the shim must come before its first import."""

from phimini.parallel import cpu_shim

cpu_shim.install()
