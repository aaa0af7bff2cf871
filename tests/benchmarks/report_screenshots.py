"""Screenshots of a report page for visual inspection: light and dark, on a desktop, on a phone, and in print.

    pip install playwright; apt-get install chromium poppler-utils
    .venv/bin/python tests/benchmarks/report_screenshots.py --page report.html --folder /tmp/pages

Exits with 1 if the page requests external resources, logs an error, scrolls horizontally, or has a figure whose marks
show no text under the pointer.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Request

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"
MARK = "#{figure} figure svg [role='graphics-symbol'][aria-label]:not([aria-roledescription='axis'])"
MARK += ":not([aria-roledescription='legend']):visible"
# Ids of the sections with a figure.
FIGURES = "figures => figures.map(figure => figure.closest('section').id)"


@dataclass(frozen=True)
class View:
    """Window size in pixels and color scheme."""

    name: str
    width: int
    height: int
    scheme: str


VIEWS = (
    View("desktop-light", 1280, 900, "light"),
    View("desktop-dark", 1280, 900, "dark"),
    View("phone-light", 390, 844, "light"),
    View("phone-dark", 390, 844, "dark"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    problems = problems_of(arguments.page.resolve(), arguments.folder, arguments.chromium)
    if shutil.which("pdftoppm"):
        pdf = arguments.folder / "print.pdf"
        subprocess.run(["pdftoppm", "-r", "70", "-png", pdf, pdf.with_suffix("")], check=True)
    print("\n".join(problems) or f"wrote {len(VIEWS)} views and a PDF to {arguments.folder}; inspect them")
    sys.exit(bool(problems))


def problems_of(page: Path, folder: Path, chromium: str) -> list[str]:
    """Write every view to a PNG file and the print version to a PDF; return the problems found."""
    from playwright.sync_api import sync_playwright

    problems: list[str] = []

    def note_request(request: "Request") -> None:
        if request.url != page.as_uri():
            problems.append(f"requests {request.url}")

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, args=FLAGS.split()
        )
        tab = browser.pages[0]
        tab.on("request", note_request)
        tab.on("console", lambda message: problems.append(f"console: {message.text}"))
        for view in VIEWS:
            tab.emulate_media(color_scheme=view.scheme)
            tab.set_viewport_size({"width": view.width, "height": view.height})
            tab.goto(page.as_uri())
            tab.screenshot(path=folder / f"{view.name}.png", full_page=True)
            if (width := tab.evaluate("document.documentElement.scrollWidth")) > view.width:
                problems.append(f"{view.name}: {width} pixels wide")
            problems += [f"{view.name}: {each}" for each in silent_figures(tab)]
        tab.emulate_media(color_scheme="dark", media="print")  # print is always light
        tab.pdf(path=folder / "print.pdf", format="A4", print_background=False)
        browser.close()
    return problems


def silent_figures(tab: Any) -> list[str]:
    """Return the figures whose first mark shows no text under the pointer."""
    silent = []
    for figure in tab.eval_on_selector_all("figure", FIGURES):
        mark = tab.locator(MARK.format(figure=figure)).first
        mark.hover(force=True)
        said = tab.locator("#pointed")
        if not said.is_visible() or said.inner_text() != mark.get_attribute("aria-label"):
            silent.append(f"the first mark of {figure} shows no text")
    return silent


if __name__ == "__main__":
    main()
