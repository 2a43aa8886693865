"""Pages that show, token by token, the data that each stage was trained on.

May import: model/io, parallel/training, stages/data, stages/report, stages/rl.
"""
