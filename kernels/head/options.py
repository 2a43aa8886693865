"""The options of a head op: what a caller may pass, and the frozen record that carries it to the back-ends.

    HeadKeywords    the keyword arguments that all four ops share, each with its meaning
    HeadOptions     the same as values. Each op has a subclass with its own numbers and its computation

Options hold no tensors, and compare by value: torch.compile guards on them (ConstantOptions).
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypedDict

import torch.distributed as dist
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase
from torch.distributed import distributed_c10d

from phimini.kernels.backend.launch import Backend


class HeadKeywords(TypedDict, total=False):
    """Keyword arguments of every head op."""

    ignore_index: int
    """Target of rows that do not count; -100 by default."""
    group: dist.ProcessGroup | None
    """Ranks that share the vocabulary: weight_VD is this rank's V/TP rows. Targets stay global, hidden_MD is the same
    on all ranks and its gradient is summed over them."""
    sequence_parallel: bool
    """With `group`: hidden_MD is this rank's M/TP rows, in rank order. False by default."""
    chunk_bytes: int | None
    """Bytes of logits held at a time; by default `CHUNK_BYTES` of head/rows.py."""
    max_rows: int | None
    """Upper bound of the number of rows that count, where the host knows one. It spares a GPU the rows beyond."""
    _backend: Backend | None
    """Private: tests run the Triton kernels on a CPU, in the interpreter."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options of one call, see `HeadKeywords`. `with_entropy`: whether the op reports entropies."""

    op: ClassVar[str]
    """Name of the public op, for error messages."""

    ignore_index: int = -100
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    chunk_bytes: int | None = None
    max_rows: int | None = None
    _backend: Backend | None = None
    with_entropy: bool = True


@dataclass(frozen=True)
class ConstantOptions(OpaqueBase):
    """Options as a constant of a torch.compile graph, which guards on them and recompiles for others.

    Before torch 2.12 a class without the base `OpaqueBase` cannot be registered.
    """

    kind: type[Any]
    """The class of the options."""
    values: tuple[Any, ...]
    """Values of the fields of `kind`, in order."""

    @staticmethod  # torch 2.11 compiles no call of a class method of an opaque type
    def of(options: HeadOptions) -> "ConstantOptions":
        """Return `options` with symbolic numbers, as dynamic shapes make them, replaced by their values."""
        from torch.fx.experimental.symbolic_shapes import (
            guard_scalar,  # half a second, for compiling only
        )

        values = [getattr(options, field.name) for field in fields(options)]
        return ConstantOptions(
            type(options),
            tuple(guard_scalar(v) if isinstance(v, int | float) else v for v in values),
        )

    def options(self) -> Any:
        """Return the options."""
        names = (field.name for field in fields(self.kind))
        return self.kind(**dict(zip(names, self.values, strict=True)))

    def __fx_repr__(self) -> tuple[str, dict[str, Any]]:
        """Return source that makes an equal object, and the names it uses."""
        values = [
            f"_group({value.group_name!r})" if isinstance(value, dist.ProcessGroup) else repr(value)
            for value in self.values
        ]
        names = {
            "ConstantOptions": ConstantOptions,
            self.kind.__name__: self.kind,
            "_group": distributed_c10d._resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]
        }
        return f"ConstantOptions({self.kind.__name__}, ({', '.join(values)},))", names


register_opaque_type(ConstantOptions, typ="value")
