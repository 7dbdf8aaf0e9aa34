"""The page in a real browser, where there is one."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pho_service.shown.page import render

PROBE = """<script>
addEventListener("load", () => setTimeout(() => parent.postMessage(
  document.documentElement.scrollWidth - document.documentElement.clientWidth, "*"), 500));
</script>"""
FRAME = """<body><iframe src="page.html" width="390" height="800"></iframe>
<script>onmessage = (event) => { document.body.dataset.beyond = event.data; };</script></body>"""


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Callable[[Path], tuple[str, str]]:
    """Open a file; gives what the page has become, and what the browser said of it."""

    def run(path: Path) -> tuple[str, str]:
        result = subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
            ],
            capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
        said = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
        return result.stdout, "\n".join(said)

    return run


def test_style_is_applied(report_of: Any, browse: Any, tmp_path: Path) -> None:
    """The page's policy lets its own style apply, and a browser complains of nothing."""
    path = tmp_path / "page.html"
    path.write_text(render(report_of()), encoding="utf-8")
    document, said = browse(path)

    assert said == ""
    assert len(re.findall('<svg class="chart"', document)) == 8


def test_a_script_in_a_name_does_not_run(report_of: Any, browse: Any, tmp_path: Path) -> None:
    hostile = "<script>document.title='hacked'</script><img src=x onerror=document.title='hacked'>"
    report = report_of(title=hostile, asked={"model": hostile}, layers={}, importance={hostile: 1})
    path = tmp_path / "page.html"
    path.write_text(render(report), encoding="utf-8")
    document, said = browse(path)

    assert said == ""
    assert "<title>hacked" not in document
    assert "<img" not in document


def test_on_a_phone(report_of: Any, browse: Any, tmp_path: Path) -> None:
    """On a narrow screen nothing is wider than the page: tables scroll by themselves."""
    report = report_of(title="w" * 300, warnings=["m" * 300], commands=["x" * 300])
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(report))
    (tmp_path / "page.html").write_text(free.replace("</body>", f"{PROBE}</body>"))
    path = tmp_path / "frame.html"
    path.write_text(FRAME)
    document, _ = browse(path)

    assert 'data-beyond="0"' in document
