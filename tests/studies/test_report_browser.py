"""The report in Chromium: on a desktop and on a phone, light and dark, on paper; nothing is refused, nothing overflows.

Chromium is the system's (Debian's package); Playwright steers it and brings none. Where either is missing these tests
are skipped.
"""

import itertools
import shutil
from dataclasses import dataclass, field

import pytest

from tests.studies.reported import CHARTS, written

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,  # a browser's start and every picture: half a minute of a busy machine
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH"),
    pytest.mark.timeout(180),  # the first of them starts the browser and takes every picture: 6 s on a quiet machine
]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
WAYS = [*itertools.product(SIZES, ("light", "dark"), ("screen",)), ("desktop", "dark", "print")]

_WATCH = "window.refused = []; addEventListener('securitypolicyviolation', e => refused.push(e.violatedDirective))"
_LOOK = """() => {
  const size = e => { const b = e.getBoundingClientRect(); return [b.width, b.height] };
  const drawing = f => [...f.querySelectorAll('svg')].map(size).filter(([w, h]) => w > 0 && h > 0);
  return {
    width: document.documentElement.scrollWidth, inner: innerWidth,
    figures: [...document.querySelectorAll('figure')].map(size),
    drawings: [...document.querySelectorAll('figure')].map(drawing),
    lettered: [...document.querySelectorAll('figure svg')].filter(s => size(s)[0] > 0).map(s => {
      const sheet = s.getBoundingClientRect();
      return [...s.querySelectorAll('text')].every(t => {
        const b = t.getBoundingClientRect(); return b.left >= sheet.left - 1 && b.right <= sheet.right + 1 });
    }),
    refused, background: getComputedStyle(document.body).backgroundColor,
    bar: getComputedStyle(document.querySelector('#figure-strategies .f-c1')).fill,
    rows: [...document.querySelectorAll('details td')].filter(e => e.checkVisibility(
      {contentVisibilityAuto: true, visibilityProperty: true})).length,
  }
}"""


@dataclass
class Seen:
    """What a browser made of a page."""

    complaints: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    page: dict = field(default_factory=dict)
    picture: object = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def seen(folder):
    """The report in every way, a page that breaks its own policy, and a figure's CSV as downloaded."""
    text = written(folder)
    tampered = folder / "tampered.html"
    tampered.write_text(text.replace("<h1>", '<h1 style="color: red">').replace("</body>", "<script>1</script></body>"))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            found = {way: _seen(browser, folder / "report.html", way) for way in WAYS}
            found["tampered"] = _seen(browser, tampered, WAYS[0])
            found["download"] = _downloaded(browser, folder / "report.html")
        finally:
            browser.close()
    return found


def _seen(browser, path, way):
    size, scheme, media = way
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        is_mobile=size == "phone",
    )
    seen = Seen()
    try:
        page = context.new_page()
        page.add_init_script(_WATCH)
        page.on("console", lambda m: seen.complaints.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: seen.complaints.append(f"error: {e}"))
        page.on("request", lambda r: seen.requests.append(r.url))
        page.emulate_media(media=media, color_scheme=scheme)
        page.goto(path.as_uri())
        seen.page = page.evaluate(_LOOK)
        seen.picture = path.with_name(f"{path.stem}-{'-'.join(way)}.png")
        page.screenshot(path=seen.picture, full_page=True)
    finally:
        context.close()
    return seen


def _downloaded(browser, path):
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(path.as_uri())
        page.locator("#figure-speed-up summary").click()
        with page.expect_download() as waiting:
            page.locator("#figure-speed-up .download a").click()
        target = path.with_name("downloaded.csv")
        waiting.value.save_as(target)
        return waiting.value.suggested_filename, target.read_bytes()
    finally:
        context.close()


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_it_renders_without_a_complaint(seen, way):
    found = seen[way]
    assert found.complaints == []
    assert found.page["refused"] == []
    assert [url for url in found.requests if not url.startswith(("file://", "data:"))] == []
    assert found.picture.stat().st_size > 20_000


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_nothing_is_wider_than_the_screen_and_every_figure_is_seen(seen, way):
    page = seen[way].page
    assert page["width"] <= page["inner"] == SIZES[way[0]][0]
    assert len(page["figures"]) == len(CHARTS)
    assert all(width > 0 and height > 0 for width, height in page["figures"])
    assert [len(drawings) for drawings in page["drawings"]] == [1] * len(CHARTS), "one of the two widths"
    assert all(page["lettered"]), "every word lies on its sheet"


def test_a_page_that_breaks_the_policy_is_noticed(seen):
    assert {"style-src-attr", "script-src-elem"} <= set(seen["tampered"].page["refused"])
    assert seen["tampered"].complaints


def test_dark_is_dark_and_paper_is_white(seen):
    light, dark, paper = (
        seen["desktop", s, m].page for s, m in [("light", "screen"), ("dark", "screen"), ("dark", "print")]
    )
    assert light["background"] == paper["background"] == "rgb(255, 255, 255)"
    assert light["bar"] == paper["bar"] == "rgb(0, 114, 178)"
    assert dark["background"] != light["background"]
    assert dark["bar"] != light["bar"]


def test_on_paper_the_data_is_open(seen):
    assert seen["desktop", "light", "screen"].page["rows"] == 0
    assert seen["desktop", "dark", "print"].page["rows"] > 100


def test_a_figures_csv_can_be_downloaded(seen, folder):
    name, text = seen["download"]
    assert name == "speed-up.csv"
    assert text == (folder / "figures" / "speed-up.csv").read_bytes()
