"""Removal of the files that a killed command left in a run's folder."""

import os
import re
import shutil
from pathlib import Path

from phimini.model.io import json_files

REMOVED = ".removed"
"""ends the name of a stage's folder that `--redo` is removing"""
# The names that `json_files` and `safetensors_folder` give a file until it is whole.
_TEMPORARY = re.compile(
    json_files.TEMPORARY.pattern + r"|\.tmp-\d+-\d+\.safetensors|\..+" + re.escape(REMOVED)
)  # fmt: skip


def remove_remains(out: Path) -> None:
    """Delete temporary files, and the files that a complete stage needed only on its way.

    The caller holds the run's lock, so no other process writes. Links are not followed: they lead to another run's folder.
    Cut-off checkpoints are removed by the next save (`checkpoint.files.remove_cut_off`).
    """
    for folder, folders, files in os.walk(out):
        if "summary.json" in files:
            Path(folder, "begun.json").unlink(missing_ok=True)
            shutil.rmtree(Path(folder, "checkpoints"), ignore_errors=True)
        for name in files:
            if _TEMPORARY.fullmatch(name):
                Path(folder, name).unlink(missing_ok=True)
        for name in folders:
            if name.endswith(REMOVED) and _TEMPORARY.fullmatch(name):
                shutil.rmtree(Path(folder, name), ignore_errors=True)
