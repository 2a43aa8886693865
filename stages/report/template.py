"""Pages from the templates of this folder: one file with style, scripts and data, which needs no network."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from phimini.stages.report import formats

_FOLDER = Path(__file__).with_name("templates")
_FILTERS = ("duration", "interval", "percent", "points", "spaced", "whole")


def render(
    template: str,
    *,
    scripts: Sequence[str] = ("plotly", "charts.js"),
    styles: Sequence[str] = ("page.css",),
    **values: object,
) -> str:
    """Return the page of `template` with `values`. A name that the template lacks raises jinja2.UndefinedError.

    scripts: files of the folder, or "plotly". styles: files of the folder.
    """
    texts = [_plotly() if name == "plotly" else _file(name) for name in scripts]
    style = Markup("").join(map(_file, styles))
    found = _environment().get_template(template)
    return found.render(values, style=style, scripts=texts, policy=_policy(texts))


@cache
def _plotly() -> Markup:
    return Markup(get_plotlyjs().replace("\r\n", "\n"))


@cache
def _environment() -> Environment:
    """Return the template environment: all text is escaped and cleaned, a missing value is an error."""
    made = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, finalize=formats.clean,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {name: getattr(formats, name) for name in _FILTERS}
    return made


def _file(name: str) -> Markup:
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _policy(scripts: list[Markup]) -> str:
    """Return a content security policy: the browser makes no request and runs only these scripts."""
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
