"""The site builds without a warning, and each page renders correctly in Chromium: light, dark, narrow and wide."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import time
import tomllib
import typing

import pytest
from browser import CHROMIUM, DRIVER, browser
from pages import ROOT

import forkshm

needs_sphinx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "pydata_sphinx_theme", "numpy")),
    reason="needs pip install 'forkshm[docs]'",
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Chromium and chromedriver (Debian: chromium, chromium-driver)"
)
# The build command of docs/build.
OPTIONS = ("-W", "--keep-going", "-q", "-b", "html")
# Pages are dark below this brightness (0 to 255) in dark mode, and above it in light mode.
HALF = 128

# Sum of the channels of the color behind the page.
_BRIGHTNESS = """
const color = getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number);
return (color[0] + color[1] + color[2]) / 3;
"""
# The smallest distance between two numbers of a worker that are on one line.
_CLOSEST = """
const cells = [...document.querySelectorAll('.workers td.n')].map(cell => cell.getBoundingClientRect());
return Math.min(100, ...cells.slice(1).map((box, i) => box.top == cells[i].top ? box.left - cells[i].right : 100));
"""
_OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


def test_the_extra_has_each_library_whose_module_is_documented():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.match(r"[\w-]+", each)[0] for each in each_extra} for extra, each_extra in extras.items()}
    documented = {
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"forkshm\.(\w+)$", page.read_text(), re.MULTILINE)
    }
    assert documented & set().union(*names.values()) <= names["docs"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: the one in FORKSHM_SITE, or one without the gallery, whose programs take a minute."""
    if built := os.environ.get("FORKSHM_SITE"):
        return pathlib.Path(built)
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, str(ROOT / "docs" / "make_reports.py")], check=True, timeout=100)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *OPTIONS, "-d", str(out / "trees"), str(ROOT / "docs"), str(out / "html")],
        env={**os.environ, "FORKSHM_DOCS_GALLERY": "0"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert not done.returncode, done.stderr
    return out / "html"


def look_at(window, address):
    """Return the faults of a page, each as a sentence."""
    faults = []
    for width in (400, 1400):
        for scheme in ("light", "dark"):
            window.scheme(scheme)
            window.window(width)
            window.open(address)
            where = f"{address.rpartition('/')[2]} at {width} px, {scheme}"
            faults += [f"{where}: {complaint}" for complaint in window.complaints()]
            if (over := window.run(_OVERFLOW)) > 0:
                faults.append(f"{where}: {over} px wider than the window")
            brightness = window.run(_BRIGHTNESS)
            if (brightness < HALF) != (scheme == "dark"):
                faults.append(f"{where}: the page behind the text has brightness {brightness:.0f}")
    return faults


@pytest.mark.nightly
@needs_sphinx
@needs_chromium
def test_each_page_is_right_in_a_browser(site):
    pages = [path for path in sorted(site.rglob("*.html")) if path.relative_to(site).parts[0] != "source"]
    pages = [path for path in pages if path.name != "webpack-macros.html"]  # a template of the theme
    pages.append(next(iter((site / "source").rglob("_policy.py.html"))))
    assert len(pages) > 30
    with browser() as window:
        faults = [fault for path in pages for fault in look_at(window, path.as_uri())]
    assert not faults, "\n".join(faults)


@pytest.mark.nightly
@needs_sphinx
def test_the_site_needs_no_network(site):
    """No page loads a script, a style, a font or a picture from elsewhere; links may lead there."""
    for path in site.rglob("*.html"):
        text = path.read_text(errors="replace")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']([^\"']+)", text)
        loaded += re.findall(r"<link\b[^>]*\brel=[\"'](?:stylesheet|preload|icon)[\"'][^>]*\bhref=[\"']([^\"']+)", text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path


def _text(markup):
    """Return the text of a piece of HTML, with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).split())


@pytest.mark.nightly
@needs_sphinx
def test_the_reference_shows_parameters_and_fields(site):
    """Each signature has all parameters, each field of a dataclass its description, and no type a private module."""
    shown = {}
    for page in (site / "api").glob("*.html"):
        for name, entry in re.findall(r'<dt class="sig[^>]*\bid="([^"]+)">(.*?)</dt>', page.read_text(), re.DOTALL):
            shown[name] = _text(entry)
    missing = []
    for name in forkshm.__all__:
        function = getattr(forkshm, name)
        if f"forkshm.{name}" not in shown or isinstance(function, type):
            continue
        signature = inspect.signature(function)
        # The first of several signatures of one name is that of a decorator without options.
        if typing.get_overloads(inspect.unwrap(function)):
            continue
        missing += [(name, each) for each in signature.parameters if each not in shown[f"forkshm.{name}"]]
    for kind in (
        "pool.PoolReport",
        "pool.PoolStatistics",
        "pool.WorkerReport",
        "pool.SlowTask",
        "accounting.Statistics",
    ):
        fields = dataclasses.fields(pkgutil.resolve_name(f"forkshm.{kind}"))
        text = (
            (site / "api" / "pools.html")
            .read_text()
            .partition(f'id="forkshm.{kind}"')[2]
            .partition('<dt class="sig')[0]
        )
        missing += [
            (kind, each.name)
            for each in fields
            if f"forkshm.{kind}.{each.name}" not in shown and f"<strong>{each.name}</strong>" not in text
        ]
    regions = (site / "api" / "regions.html").read_text()
    for kind in ("Mode", "Creation", "region.Advice"):
        text = regions.partition(f'id="forkshm.{kind}"')[2].partition('<dt class="sig')[0]
        members = pkgutil.resolve_name(f"forkshm.{kind}")
        missing += [(kind, each.name) for each in members if f"<strong>{each.name}</strong>" not in text]
    assert not missing
    # A first line with a colon would be taken for the type of a property.
    assert not [page.name for page in (site / "api").glob("*.html") if re.search(r"<dt[^>]*>Type<", page.read_text())]
    assert not [text for text in shown.values() if re.search(r"\._\w+\.", text)]


@pytest.mark.slow
@needs_chromium
def test_reports_and_traces_are_right_in_a_browser(tmp_path):
    paths = {name: tmp_path / f"{name}.html" for name in ("report", "trace")}

    def work(seconds):
        time.sleep(seconds)

    work.__name__ = work.__qualname__ = "a_long_name_" * 20
    with forkshm.Pool(2) as pool:
        with pool.trace(paths["trace"]):
            pool.map(abs, range(1000), chunksize=10)
            pool.map(work, [0.002] * 2, chunksize=1)
        pool.report().save(paths["report"])
    with browser() as window:
        faults = [fault for path in paths.values() for fault in look_at(window, path.as_uri())]
        assert not faults, "\n".join(faults)
        # On a phone, and in a frame on a page there, no column of a table is cut off, and no number touches the next.
        for width in (390, 340):
            window.window(width)
            for path in paths.values():
                window.open(path.as_uri())
                assert window.run(
                    "return [...document.querySelectorAll('.wide')].every(t => t.scrollWidth <= t.clientWidth)"
                )
                assert window.run(_CLOSEST) >= 6
        window.window(1400)
        # The timeline has been painted, zooms, and describes what is under the pointer.
        window.open(paths["trace"].as_uri())
        painted = "return new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
        assert window.run(painted) > 5
        window.run("document.getElementById('in').click()")
        assert window.run("return (to - from) / data.end") == pytest.approx(0.5)
        window.run(
            "const box = canvas.getBoundingClientRect();"
            "canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 50, clientY: box.top + 45}));"
        )
        assert window.run("return told.textContent")


def test_nothing_of_a_page_ends_its_script_early(tmp_path):
    """Names of tasks are shown as text, whatever characters they contain."""
    path = tmp_path / "trace.html"
    nasty = "</script><b>&"

    def work(x):
        return x

    work.__name__ = work.__qualname__ = nasty
    with forkshm.Pool(1) as pool, pool.trace(path):
        pool.map(work, range(3))
    text = path.read_text()
    assert text.count("</script>") == 2
    assert "<b>" not in text
    assert nasty not in pathlib.Path(path).read_text()
