"""Pages in headless Chromium."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium")


def sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def browse(page: Path, width: int, folder: Path, *flags: str) -> tuple[str, str]:
    """Return the page's tree after its scripts ran, and what the browser said on its console. folder: for its profile."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}",
         "--enable-logging=stderr", f"--window-size={width},20000", *flags, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(page: Path, width: int, folder: Path, probe: str, *flags: str) -> dict[str, Any]:
    """Return what a script finds in a page, `found` of its function `probe`, and `said`, the browser's console.

    500 pixels is the narrowest window that headless Chromium opens. probe: JavaScript, the body of an async function.
    """
    script = (
        f"addEventListener('load', async () => {{ const found = await (async () => {{{probe}}})();\n"
        "document.body.dataset.found = JSON.stringify(found); });"
    )
    text = page.read_text(encoding="utf-8")
    text = text.replace("script-src", f"script-src 'sha256-{sha256(script)}'", 1)
    injected = folder / f"probed-{width}.html"
    injected.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    tree, said = browse(injected, width, folder / "profile", *flags)
    found = json.loads(unescape(re.findall(r'data-found="([^"]*)"', tree)[0]))
    return found | {"said": said}
