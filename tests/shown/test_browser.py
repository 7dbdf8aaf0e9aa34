"""The page in a real browser, where there is one."""

import pytest

from pho_service.shown.page import render
from pho_service.spec.configuration import Continuation


@pytest.fixture
def browse(browser, report_of, tmp_path):
    """Open a report on a phone; afterwards, the browser must have complained of nothing."""
    said = []
    with browser.new_context(viewport={"width": 390, "height": 800}) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))

        def load(**changes):
            path = tmp_path / "page.html"
            path.write_text(render(report_of(**changes)), encoding="utf-8")
            page.goto(path.as_uri())
            return page

        yield load
    assert said == []


def test_the_pages_policy_lets_its_own_style_apply(browse):
    page = browse()

    assert page.locator("svg.chart").count() == 7
    assert page.evaluate("getComputedStyle(document.querySelector('table')).borderCollapse") == (
        "collapse"
    )


def test_a_script_in_a_name_does_not_run(browse):
    hostile = "<script>document.title='hacked'</script><img src=x onerror=document.title='hacked'>"
    page = browse(title=hostile, asked={"model": hostile}, layers={}, importance={hostile: 1})

    assert not page.title().startswith("hacked")
    assert page.locator("img").count() == 0


def test_on_a_phone_nothing_is_wider_than_the_page_tables_scroll_by_themselves(browse, report_of):
    written = Continuation(prompt="If " * 20, dense="so " * 40, pruned="then " * 40)
    found = report_of().configuration.model_copy(update={"continuations": [written]})
    long = {"title": "w" * 300, "warnings": ["m" * 300], "commands": ["x" * 300]}
    page = browse(configuration=found, **long)
    width = "each => each.scrollWidth - each.clientWidth"
    texts = page.locator(".texts td").all()

    assert page.locator("html").evaluate(width) == 0
    assert page.locator(".wide:has(.texts)").evaluate(width) == 0  # texts stand one below the other
    assert len({each.bounding_box()["x"] for each in texts}) == 1 < len(texts)
