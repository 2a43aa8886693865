"""The verbs of the command line, one file each, with the loop of each stage visible in its file.

May import: kernels, model/*, parallel/*, stages/*.
"""
