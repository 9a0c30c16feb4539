"""Reports, pools and regions as HTML: pages for a browser, tables for notebooks."""

from __future__ import annotations

import html.parser
import json
import re

import forkshm


class Balance(html.parser.HTMLParser):
    """Finds elements that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.faults = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def faults(text):
    parser = Balance()
    parser.feed(text)
    parser.close()
    return parser.faults + parser.open


def test_a_report_is_a_page(pool, tmp_path):
    pool.map(abs, range(10))
    path = tmp_path / "report.html"
    report = pool.report()
    report.save(path)
    text = path.read_text()
    assert text == report.to_html()
    assert text.startswith("<!DOCTYPE html>")
    assert not faults(text)
    assert text.count("ForkPoolWorker") == 2 or "SpawnPoolWorker" in text
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text  # nothing is loaded


def test_html_for_notebooks_is_balanced(pool):
    pool.map(abs, range(10))
    with forkshm.anonymous_shared_memory(1000) as region:
        for thing in (pool, pool.report(), region):
            text = thing._repr_html_()
            assert "<table" in text
            assert not faults(text)
            # Notebooks align cells to the right, unless they say otherwise.
            assert not re.search(r"<t[dh]\b(?![^>]*text-align)", text)
        assert "1,000 bytes" in region._repr_html_()
    assert "closed" in region._repr_html_()


def test_a_pool_that_has_ended_shows_itself():
    with forkshm.Pool(1) as pool:
        pass
    assert "<table" in pool._repr_html_()


def test_a_trace_is_a_page_with_a_row_for_each_worker(pool, tmp_path):
    path = tmp_path / "trace.HTML"
    barrier = forkshm.Barrier(2)
    with pool.trace(path):
        pool.map(lambda other: other.wait(), [barrier] * 2, chunksize=1)  # one for each worker
        pool.map(abs, range(1000), chunksize=10)
    text = path.read_text()
    assert not faults(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
    data = json.loads(re.search(r"id='data'>(.*?)</script>", text, re.DOTALL)[1])
    assert len(data["rows"]) >= 3  # two workers, and a thread of this process
    assert all(0 <= start <= start + long <= data["end"] for row in data["rows"] for start, long, *_ in row["events"])
    assert "abs" in data["names"]


def test_long_names_are_broken_and_numbers_are_not(pool):
    import dataclasses

    from forkshm.pool import SlowTask

    report = dataclasses.replace(pool.report(), slowest=(SlowTask(1.5, "f" * 300),))
    for text in (report.to_html(), report._repr_html_()):
        assert re.search(r'<td style="[^"]*overflow-wrap: anywhere">f{300}</td>', text)
        assert re.search(r'<td class="n" style="[^"]*white-space: nowrap">1.500</td>', text)


def test_a_hint_that_looks_like_html_is_text(pool):
    import dataclasses

    report = dataclasses.replace(pool.report(), hints=("<img src=x onerror=alert(1)>",))
    for text in (report.to_html(), report._repr_html_()):
        assert "<img" not in text
