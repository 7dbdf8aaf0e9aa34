"""Reports put together by hand, and pages taken apart."""

from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from pho_service.shown.page import render
from pho_service.shown.report import LayerCell, Report, ReportTrial, StageTime
from pho_service.spec.configuration import Configuration

CONFIGURATION = Configuration.model_validate(
    {
        "method": "crepe",
        "pattern": "0.5",
        "scope": "global",
        "coefficients": {
            "row": 0.25, "column": 0.5, "neighbourhood": 0.25, "kernel_size": 5,
            "activation_exponent": 0.875,
        },
        "confirmation": {
            "perplexity": 20.0, "tokens": 496, "context_length": 32, "text": {"source": "c.txt"},
        },
        "finalists": [{"method": "crepe", "trial": 4}, {"method": "crepe", "trial": 5}],
        "versions": {"optuna": "5.0.0"},
    }
)  # fmt: skip
TRANSFER = {
    "target": "org/other",
    "perplexities": {"dense": 10.0, "wanda": 24.0, "ria": 25.0, "transferred": 20.5, "own": 20.0},
    "proxies": {"wanda": 0.4, "ria": 0.5, "transferred": 0.3, "own": None},
    "regret": 0.1,
    "proxy_regret": None,
    "warnings": [],
}


def trial(number, value, method="crepe", **more):
    return ReportTrial(number=number, method=method, value=value, **more)


TRIALS = [
    trial(0, 0.8, "wanda", divergence=0.75),
    trial(1, 0.9, "ria-row", divergence=0.875),
    trial(2, 1.0, "ria-layer", perplexity=25.0, divergence=1.0),
    trial(3, None),
    trial(4, 0.5, perplexity=20.0, divergence=0.5),
    trial(5, 0.4, perplexity=22.0, divergence=0.625),
    trial(6, 0.6, divergence=0.75),
]
CELLS = [
    LayerCell(block=f"model.layers.{b}", kind=kind, error=0.1 ** (b + 1), sparsity=0.4 + 0.1 * b)
    for b in range(3)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
]


class Page(HTMLParser):
    """A page taken apart: by section, figure and table."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.text = {None: ""}
        self.figures = {}
        self.drawn = {}
        self.scripts = []
        self.styles = []
        self.tables = {}
        self._section = None
        self._figure = self._series = ""
        self._inside = []
        self._rows = []
        self._caption = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag in ("meta", "link", "img", "br"):
            return
        self._inside.append((tag, found))
        if tag == "section":
            self._section = found["id"]
            self.text[self._section] = ""
        if tag == "figure":
            self._figure = found["id"]
            self.figures[self._figure], self.drawn[self._figure] = {}, {}
        self._series = found.get("data-name", "") if tag == "g" else self._series
        if self._figure and self._series and tag in ("circle", "path", "rect", "polyline"):
            drawn = self.drawn[self._figure]
            drawn[self._series] = drawn.get(self._series, 0) + 1
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        self._inside.pop()
        if tag == "section":
            self._section = None
        if tag == "figure":
            self._figure = ""
        if tag == "g":
            self._series = ""
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        tag = self._inside[-1][0] if self._inside else ""
        if tag == "title" and self._series:
            self.figures[self._figure].setdefault(self._series, []).append(data)
        elif tag == "script":
            self.scripts.append(data)
        elif tag == "style":
            self.styles.append(data)
        else:
            self.text[self._section] += data
        if tag == "caption":
            self._caption += data
        if tag in ("td", "th"):
            self._rows[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report_of():
    """A report of a search of which everything is known, with some values changed."""

    def build(**changes):
        values = {
            "title": "mine 0123",
            "subject": "search",
            "state": "succeeded",
            "made_at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
            "asked": {"model": "org/name", "seed": "7"},
            "warnings": ["The best lies on the border."],
            "configuration": CONFIGURATION,
            "objective": "activation-reconstruction/blend",
            "trials": TRIALS,
            "importance": {"row_share": 0.75, "kernel_size": 0.25},
            "layers": {"org/name": CELLS},
            "transfers": [TRANSFER],
            "stages": [
                StageTime(kind="calibrate", done=True, seconds=12.0, attempts=1),
                StageTime(kind="search", done=True, seconds=0.7, attempts=2),
                StageTime(kind="perplexity", done=True, seconds=3.0, attempts=1),
                StageTime(kind="perplexity", done=False, seconds=None, attempts=0),
            ],
            "document": {"model": "org/name", "pattern": "0.5"},
            "happened": [(datetime(2026, 1, 2, 3, 3, tzinfo=UTC), "succeeded")],
            "commands": ["pho submit --job job.json"],
            "prune_commands": ["pho pull 1 --prune --out pruned"],
            "versions": {"optuna": "5.0.0"},
        }
        return Report(**{**values, **changes})

    return build


@pytest.fixture
def page_of(report_of):
    return lambda **changes: Page(render(report_of(**changes)))


@pytest.fixture
def empty():
    return {
        "state": "queued", "asked": {}, "warnings": [], "configuration": None, "trials": [],
        "importance": {}, "layers": {}, "transfers": [], "stages": [], "document": None,
        "happened": [], "commands": [], "prune_commands": [], "versions": {},
    }  # fmt: skip
