"""Lint for plain English: `python tests/repo/prose.py [ROOT]`, run by `make lint`.

The first line of a docstring, or of a README's paragraph, is a verb phrase or a noun phrase. At most 1 % of them may
start with a question word, contain none, nothing or nobody, or use an odd idiom. Invented terms are not names.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ["kernels", "model", "parallel", "stages", "bench", "tests"]
CLUMSY = re.compile(
    r"^(What|Which|Whose|Who|Whether|Where|None)\b|\bnone\b|\b[Nn](othing|obody)\b"
    r"|\b(held to|of ours|anew|goes on)\b"
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
INVENTED = {"agree", "beside", "roll_call", "traps", "young"}
INVENTED_DEFINITIONS = INVENTED | {"once", "rest", "words"}  # fine as names of variables


def read_python(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, first line of a docstring or "", invented name or "")."""
    yield 1, "", path.stem if path.stem in INVENTED_DEFINITIONS else ""
    for node in ast.walk(ast.parse(path.read_text())):
        defined, used = getattr(node, "name", ""), getattr(node, "id", getattr(node, "arg", ""))
        name = defined if defined in INVENTED_DEFINITIONS else used if used in INVENTED else ""
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        yield getattr(node, "lineno", 1), (text or "\n").splitlines()[0], name


def read_readme(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the first line of each heading, paragraph and list, without code and tables."""
    text = re.sub(r"(?s)```.*?```", lambda code: "\n" * code[0].count("\n"), path.read_text())
    for match in re.finditer(r"(?:\A|\n\n)[#*\-0-9. ]*(?![ |#])(.+)", text):
        yield text.count("\n", 0, match.start(1)) + 1, match[1], ""


def main(root: Path) -> int:
    """Print findings and counts per package; return 1 if there are too many."""
    files = {name: sorted((root / name).rglob("*.py")) for name in PACKAGES}
    files["READMEs"] = [*root.glob("README.md"), *(f for p in PACKAGES for f in (root / p).rglob("README.md"))]  # fmt: skip
    total = []
    for package, paths in files.items():
        read = read_readme if package == "READMEs" else read_python
        found = [(path.relative_to(root), *item) for path in paths for item in read(path)]
        lines = [(f"{p}:{n}: ", text, CLUMSY.search(re.sub("`[^`]*`", "", text))) for p, n, text, _ in found if text]  # fmt: skip
        clumsy = [f"{where}{bad[0]!r} in the first line: {text}" for where, text, bad in lines if bad]  # fmt: skip
        invented = [f"{p}:{n}: {name!r} is an invented term" for p, n, _, name in found if name]
        share = f"{len(clumsy)} of {len(lines)} first lines, {len(clumsy) / max(len(lines), 1):.1%}"
        print(*clumsy, *invented, f"prose: {package}: {share}", sep="\n")
        total.append((len(lines), len(clumsy), len(invented)))
    num_lines, num_clumsy, num_invented = (sum(column) for column in zip(*total, strict=True))
    print(f"prose: {num_clumsy} of {num_lines} first lines (limit 1 %), {num_invented} invented terms (limit 0)")  # fmt: skip
    return int(num_clumsy > 0.01 * num_lines or num_invented > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
