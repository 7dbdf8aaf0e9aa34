"""The documentation as a site."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="(?:https?:)?//', re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs` builds it: a link, an anchor or a page that is not there is an error."""
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: see extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def text_of(page):
    return re.sub(r"<[^>]*>", "", page.read_text())


def test_each_markdown_file_is_a_page_and_no_source_is_in_the_site(site):
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}

    assert {page.with_suffix(".html") for page in pages} <= {
        path.relative_to(site) for path in site.rglob("*.html")
    }
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".jinja")]


def test_a_browser_asks_no_other_host_for_scripts_styles_fonts_or_pictures(site):
    texts = [path.read_text() for path in site.rglob("*.html")]

    assert texts
    assert not [found for text in texts for found in FETCHED.findall(text)]


def test_every_verb_is_in_the_reference_with_its_options_and_its_example(site):
    from pho_service.cli import VERBS

    text = text_of(site / "reference" / "cli.html")

    assert all(f"Usage: pho {verb} " in text for verb in VERBS)
    assert "Usage: pho keys create" in text
    assert "--calibration-memory TEXT" in text
    assert "pho keys revoke pho_AbCdEf" in text


def test_every_operation_and_every_field_of_a_job_is_in_the_reference(site):
    from pho_service.spec.job import JobSpec

    page = (site / "reference" / "http.html").read_text()

    assert "POST /v1/jobs/{job_id}:cancel" in page
    assert "GET /healthz" in page
    assert all(f"<code>{field}</code>" in page for field in JobSpec.model_fields)
    assert 'href="#jobspec"' in page
