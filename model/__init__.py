"""Phi-4-Mini on one device, without process groups and without files.

May import: kernels, kernels/backend.
"""
