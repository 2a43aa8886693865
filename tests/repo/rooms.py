"""Write the README's lines of rooms from the laws: `python tests/repo/rooms.py`.

A room is a package folder, and the first sentence of its `__init__.py` says what belongs there.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ["kernels", "model", "parallel", "stages", "bench"]
LINES = re.compile(r"(?:^- \[[a-z_/]+/\]\([a-z_/]+/\): .*\n)+", re.MULTILINE)


def room_lines(root: Path = ROOT) -> str:
    """Return a Markdown list of the rooms under `root` with the first sentence of each law."""
    lines = []
    for file in (file for layer in LAYERS for file in sorted((root / layer).rglob("__init__.py"))):
        room = file.parent.relative_to(root)
        law = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0]
        lines.append(f"- [{room}/]({room}/): {law.replace(chr(10), ' ')}\n")
    return "".join(lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(LINES.sub(lambda _: room_lines(), readme.read_text()))
