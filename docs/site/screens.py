"""
Make the pictures of the pages in docs/screens anew: `make screens`, some minutes.

A service of its own runs small jobs on SmolLM2-135M, one of which has several patterns, one fails,
one is still at work, and one waits; Chromium then opens each page wide, narrow, and in dark mode.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from local_service import service, wait_for_workers
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from pho_service.client import Client
from pho_service.models.builtin import smollm2, write_texts
from storage.records import JobState

SCREENS = Path(__file__).parents[1] / "screens"
SIZES = {"wide": (1280, "light"), "narrow": (420, "light"), "dark": (1280, "dark")}
HIGHEST = 1400  # pixels of a page that are kept
COLOURS = 128
DRAWN_MS = 10_000  # that the dashboard may take for its charts
ENOUGH = 60  # trials of the job that is at work
PAGES = (
    "list", "job-running", "job-succeeded", "job-patterns", "job-failed", "form", "compare",
    "report", "dashboard"
)  # fmt: skip
MODEL = "SmolLM2-135M.gguf"
CALIBRATION = {"text": "calibration.jsonl", "samples": 16, "context_length": 128}
CONFIRM = {"text": "confirmation.jsonl", "finalists": 2, "windows": 2}
JOB = {"model": MODEL, "preset": "crepe", "calibration": CALIBRATION, "confirm": CONFIRM}


def main() -> None:
    """Write all pictures."""
    SCREENS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        shutil.copy(smollm2(), folder / MODEL)
        write_texts(folder)
        (folder / "note.txt").write_text("A text of one line is too short to calibrate on.\n")
        with service(folder, workers=1) as url, Client(url) as client:
            wait_for_workers(url, 1)
            jobs = submit_all(client)
            with opened(url) as pages:
                for size, page in pages:
                    for each in PAGES:
                        show(page, each, jobs)
                        keep(page, SCREENS / f"{each}-{size}.png")


def submit_all(client: Client) -> dict[str, Any]:
    """Submit jobs, and wait until each is in the state that it is shown in; give them by name."""

    def submit(state: JobState, **changes: Any) -> Any:
        job = client.submit({**JOB, **changes})
        if state.is_over:
            job = client.wait(job.id)
            assert job.state is state, job
        return job

    found = {
        "failed": submit(
            JobState.FAILED, pattern="2:4", calibration={**CALIBRATION, "text": "note.txt"}
        ),
        "other": submit(JobState.SUCCEEDED, pattern="0.5", trials=60, scope="row"),
        "succeeded": submit(JobState.SUCCEEDED, pattern="0.5", trials=120),
        "patterns": submit(JobState.SUCCEEDED, patterns=["0.5", "0.6", "2:4"], trials=60),
        "running": submit(JobState.RUNNING, pattern="0.6", trials=2000),
        "waiting": submit(JobState.QUEUED, pattern="0.7", priority=-1),
    }
    while client.job(found["running"].id).progress.of("search").done < ENOUGH:
        time.sleep(0.2)
    return found


@contextmanager
def opened(url: str) -> Iterator[Iterator[tuple[str, Page]]]:
    """Open a browser; give a page of each size."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        # Without its sandbox, as root may start it nowhere else; it sees nothing but our pages.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])

        def pages() -> Iterator[tuple[str, Page]]:
            for size, (width, scheme) in SIZES.items():
                page = browser.new_page(
                    base_url=url,
                    viewport={"width": width, "height": 900},
                    color_scheme=scheme,  # type: ignore[arg-type]  # "light" or "dark"
                )
                page.set_default_timeout(120_000)
                yield size, page
                page.close()

        yield pages()
        browser.close()


def show(page: Page, name: str, jobs: dict[str, Any]) -> None:
    """Open one of ``PAGES``."""
    best, other, curve = (jobs[each].id for each in ("succeeded", "other", "patterns"))
    if name.startswith("job-"):
        page.goto(f"/jobs/{jobs[name.removeprefix('job-')].id}")
    elif name == "form":
        page.goto("/new")
        page.get_by_label("Model (needed)").fill(MODEL)
        page.get_by_label("Pattern", exact=True).fill("0.5")
        page.locator("#plan table").wait_for()
    elif name == "dashboard":
        page.goto(f"/jobs/{best}")
        page.get_by_role("link", name="Study in the dashboard").click()
        page.get_by_text("(id=").first.wait_for()  # its data has come
        page.wait_for_timeout(DRAWN_MS)
    else:
        addresses: dict[str, str] = {
            "list": "/",
            "compare": f"/compare?job={best}&job={other}&job={curve}",
            "report": f"/v1/jobs/{best}/report",
        }
        page.goto(addresses[name])


def keep(page: Page, path: Path) -> None:
    """Write what is to be seen of a page, with few colours."""
    with Image.open(BytesIO(page.screenshot(full_page=True))) as image:
        top = image.convert("RGB").crop((0, 0, image.width, min(image.height, HIGHEST)))
        # By coverage: the few dots that are green or red keep their colour.
        small = top.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(path, optimize=True)


if __name__ == "__main__":
    main()
