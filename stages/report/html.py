"""Pieces of the report's page: text made safe, numbers made readable, tables, figures, the frame around them."""

from collections.abc import Sequence
from html import escape

from phimini.stages.report.style import STYLE


def page(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Made from this run's own files; the page needs no network.</footer>\n"
        f"</main>\n</body>\n</html>\n"
    )


def section(title: str, note: str, content: str) -> str:
    words = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{words}{content}</section>"


def figure(title: str, svg: str, note: str, *, note_is_html: bool = False) -> str:
    return (
        f"<figure><figcaption>{text(title)}<small>{note if note_is_html else text(note)}</small></figcaption>"
        f"{svg}</figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`head` is text, the cells of `rows` are HTML."""
    heads = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def text(value: object) -> str:
    """Escaped; characters that a page may not hold (a random model writes them) become the replacement sign."""
    clean = "".join(
        c if c in "\n\t" or c >= " " and not "\x7f" <= c <= "\x9f" else "\ufffd" for c in str(value)
    )
    return escape(
        clean.encode("utf-8", "replace")
        .decode()
        .replace("\ufffe", "\ufffd")
        .replace("\uffff", "\ufffd")
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<i class="key {colour}"></i>{text(name)}' for colour, name in entries)


def percent(share: float) -> str:
    return f"{100 * share:.1f}\xa0%"


def interval(bounds: Sequence[float], sign: str = "") -> str:
    low, high = bounds
    return minus(f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]")


def minus(number: str) -> str:
    """With a real minus sign, as wide as the plus."""
    return number.replace("-", "−")


def short(value: float, scale: float) -> str:
    """Three digits; zero for what is nothing beside `scale`, the largest of its kind."""
    if abs(value) < 1e-4 * scale:
        return "0"
    return minus(f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
