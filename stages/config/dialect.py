"""The one dialect of every command: `key=value`, `--key value`, `--key=value` and `--switch`, nested as `stage.key`.

tyro (https://brentyi.github.io/tyro) builds the settings and prints the help. It takes the settings' defaults from a
config that a Python function returned and the help from the line under each field; pydantic-settings would need
pydantic models instead of plain dataclasses, and reads no such lines. Values are written as in TOML, lists with commas
and without brackets, and None is `none`.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from phimini.model.checked_fields import bare, check, fields_of, is_union

C = TypeVar("C")
_BOOLEANS = {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}


@dataclass(frozen=True, slots=True)
class Words:
    """A command's words, sorted: values by field path, bare words, whether help is asked for, words after `--`."""

    given: dict[str, str]
    names: list[str]
    help: bool
    tail: list[str]
    command: str
    """the words before, e.g. `plan`; errors begin with it"""


@dataclass(frozen=True)
class _Wrapped(Generic[C]):
    # tyro prints a ValueError of its root class and exits; one of a field without a name it passes on.
    settings: Annotated[C, tyro.conf.arg(name="")]


def read_words(words: Iterable[str], kind: type, command: str, *, names: int = 0) -> Words:
    """Sort the words of a command whose settings are of the dataclass `kind`, with up to `names` bare words.

    Raises ValueError for a word that names no field (with the nearest ones) and for a missing value.
    """
    fields = dict(paths(kind))
    read = Words({}, [], False, [], command)
    remaining = iter(words)
    for word in remaining:
        key, equals, text = word.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if word == "--" and "command" in fields:
            read.tail.extend(remaining)
        elif word in ("-h", "--help"):
            read = dataclasses.replace(read, help=True)
        elif not equals and not word.startswith("-"):
            if len(read.names) == names:
                raise ValueError(f"{command}: expected key=value, got {word!r}")
            read.names.append(word)
        elif key not in fields:
            raise ValueError(f"{command}: unknown {_unknown(word, key, fields)}")
        elif equals:
            read.given[key] = text
        elif fields[key] is bool:
            read.given[key] = "true"
        elif (following := next(remaining, None)) is not None:
            read.given[key] = following
        else:
            raise ValueError(f"{command}: {word}: expected a value after it")
    return read


def build(kind: type[C], words: Words, default: C | None = None) -> C:
    """Return settings with the given values, the others from `default` or the dataclass.

    Prints the help and raises SystemExit if it is asked for. Raises ValueError for a value that `check` refuses.
    """
    result = tyro.cli(
        _Wrapped[kind],
        prog=f"phimini {words.command}",
        description=kind.__doc__,
        args=["--help"] if words.help else [f"--{key}={text}" for key, text in words.given.items()],
        default=_Wrapped(tyro.MISSING_NONPROP if default is None else default),
        config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
        registry=_REGISTRY,
        use_underscores=True,
    )
    check(result.settings)
    return result.settings


def text_of(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def paths(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and type of every field at any depth; a field that tyro calls "" leaves the path as it is."""
    for name, annotated in fields_of(kind).items():
        inner = bare(annotated)
        if dataclasses.is_dataclass(inner):
            yield from paths(inner, prefix if inner is not annotated else f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            yield prefix + name, inner


def _unknown(word: str, key: str, fields: dict[str, Any]) -> str:
    inside = [path for path in fields if path.startswith(f"{key}.")]
    if inside:
        return f"{word!r}: {key} is a group of fields; set one of them, e.g. {inside[0]}=VALUE"
    last = key.rpartition(".")[2]
    same = [path for path in fields if path.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(key, fields, n=3)
    shown = [f"--{path.replace('_', '-')}" if word.startswith("--") else path for path in near]
    meant = f"did you mean {' or '.join(shown)}? " if near else ""
    return f"{word!r}; {meant}--help names every field"


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Let tyro read and print one word as a value of the dialect."""
    plain = info.type in (int, float, str, bool) or get_origin(info.type) in (Literal, tuple)
    if not plain and not is_union(info.type):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_metavar(info.type),
        instance_from_str=lambda words: _value(words[0], info.type),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [text_of(value)],
    )


def _value(text: str, kind: Any) -> Any:
    """Return `text` as a value of the type; a text of another type stays, and `check` names field and value."""
    kind = bare(kind)
    if is_union(kind):
        return None if text == "none" else _value(text, get_args(kind)[0])
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not text and bare(item) not in (int, float):  # no word; an empty number is an error
            return ()
        return tuple(_value(part, item) for part in text.split(","))
    if kind is bool:
        return _BOOLEANS.get(text, text)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _metavar(kind: Any) -> str:
    kind = bare(kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if is_union(kind):
        return f"{_metavar(get_args(kind)[0])}|none"
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])},..."
    return "[true|false]" if kind is bool else kind.__name__.upper()
