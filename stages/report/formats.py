"""Numbers and texts of the report, made readable and safe: the filters of its templates."""

from collections.abc import Sequence

from markupsafe import Markup


def clean(value: object) -> object:
    """Return `value` with the characters that a page may not hold replaced; a random model writes them.

    The replacement is U+FFFD. Markup and values that are not text are returned unchanged.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    printable = "".join(
        c if c in "\n\t" or c >= " " and not "\x7f" <= c <= "\x9f" else "\ufffd" for c in value
    )
    without_surrogates = printable.encode("utf-8", "replace").decode()
    return without_surrogates.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")


def spaced(name: object) -> str:
    return str(name).replace("_", " ")


def percent(share: float) -> str:
    return f"{100 * share:.1f}\xa0%"


def points(share: float) -> str:
    """Format a difference of shares in percentage points, with its sign."""
    return minus(f"{100 * share:+.1f}")


def interval(bounds: Sequence[float], sign: str = "") -> str:
    """Format two shares as an interval in percent. `sign="+"` shows the sign of positive bounds."""
    low, high = bounds
    return minus(f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]")


def minus(number: str) -> str:
    """Replace hyphens by minus signs, which are as wide as a plus."""
    return number.replace("-", "−")


def short(value: float, scale: float) -> str:
    """Format three digits, or 0 for a value below a ten-thousandth of `scale`, the largest of its kind."""
    if abs(value) < 1e-4 * scale:
        return "0"
    return minus(f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}")


def whole(number: float) -> str:
    return f"{number:,}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
