"""Row offsets are 64-bit in every kernel: 2^31 elements are 10,733 rows of 200,064 logits.

The interpreter cannot run tensors of that size, so this reads the kernels' source.
"""

import ast
from pathlib import Path

import pytest

import phimini.kernels

ROOM = Path(phimini.kernels.__file__).resolve().parent
BLOCK_SIZES = ("BLOCK_", "ROWS", "tiles_per_")
"""Prefixes of factors that turn a program's number into a row, a column or a tile; other factors make offsets."""
ON_POINTERS = {"_move_heads"}
"""Functions that get pointers to their rows, and no row number: their callers make the offsets."""
INDEX_NAMES = {"row", "col", "position"}
"""Row numbers that come as an argument or from memory."""


def kernels() -> dict[str, ast.FunctionDef]:
    """Return the functions of kernels/ that Triton compiles, by name."""
    return {
        node.name: node
        for file in sorted(ROOM.rglob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def narrow_products(kernel: ast.FunctionDef) -> list[str]:
    """Return products of a row or column number with a size or stride whose factors are all 32-bit."""
    index_names = set(INDEX_NAMES)
    wide_names: set[str] = set()

    def parts(node: ast.AST) -> list[ast.AST]:
        """Return the nodes of an expression, without what a load reads or a function returns."""
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "tl.program_id":
                return [node]
            if name.endswith(".to") or name in ("tl.minimum", "range"):
                inner = [*node.args, node.func]
                return [node, *(part for child in inner for part in parts(child))]
            return []
        return [node, *(part for child in ast.iter_child_nodes(node) for part in parts(child))]

    def is_index(node: ast.AST) -> bool:
        return any(
            (isinstance(part, ast.Name) and part.id in index_names)
            or (isinstance(part, ast.Call) and ast.unparse(part.func) in ("tl.program_id", "range"))
            for part in parts(node)
        )

    def is_wide(node: ast.AST) -> bool:
        return any(
            (isinstance(part, ast.Name) and part.id in wide_names)
            or (isinstance(part, ast.Call) and ast.unparse(part).endswith(".to(tl.int64)"))
            for part in [node, *parts(node)]
        )

    def is_block_size(node: ast.AST) -> bool:
        is_zero = isinstance(node, ast.Constant) and node.value == 0
        return is_zero or (isinstance(node, ast.Name) and node.id.startswith(BLOCK_SIZES))

    found = []
    for node in ast.walk(kernel):
        target = None
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target, value = node.targets[0].id, node.value
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            target, value = node.target.id, node.iter
        if target is not None and is_index(value):
            index_names.add(target)
        if target is not None and is_wide(value):
            wide_names.add(target)
    for node in ast.walk(kernel):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = node.left, node.right
            if (
                not (is_index(left) or is_index(right))
                or is_block_size(left)
                or is_block_size(right)
            ):
                continue
            if not (is_wide(left) or is_wide(right)):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", kernels())
def test_row_offsets_are_64_bit(name: str) -> None:
    assert narrow_products(kernels()[name]) == []


@pytest.mark.parametrize("name", sorted(kernels().keys() - ON_POINTERS))
def test_each_missing_cast_is_named(name: str) -> None:
    cast = ".to(tl.int64)"
    pieces = ast.unparse(kernels()[name]).split(cast)
    assert len(pieces) > 1, f"{name}: no row offset is 64-bit"
    for i in range(1, len(pieces)):
        source = cast.join(pieces[:i]) + cast.join(["", *pieces[i:]])[len(cast) :]
        (narrow,) = ast.parse(source).body
        assert isinstance(narrow, ast.FunctionDef)
        assert narrow_products(narrow), f"{name}: without cast {i} of {len(pieces) - 1}"
