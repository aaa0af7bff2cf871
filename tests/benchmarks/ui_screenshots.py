"""Screenshots of Prefect's pages of a small search, for visual inspection.

    pip install playwright; apt-get install chromium
    PREFECT_API_URL=http://127.0.0.1:4200/api .venv/bin/python tests/benchmarks/ui_screenshots.py --folder /tmp/pages

Needs a running server (`prefect server start`). Runs the search twice, so that the second run reuses all artifacts, and
creates a deployment for the form. Exits with 1 if a page lacks an expected text or figure.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter

from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from tests.small_search import small_search
from tests.workers import deploy

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"
WIDTH, HEIGHT, TALLEST = 1400, 1100, 6000  # pixels
DRAWN_FIGURES = "[...document.images].filter(i => i.src.startsWith('data:') && i.naturalWidth).length"
SETTLED = 3000  # milliseconds to wait until a page has loaded its data and drawn its graph


@dataclass(frozen=True)
class Page:
    """A page of Prefect's UI.

    Args:
        name: name of the PNG file.
        path: path below the server's address.
        shows: text that must be on the page.
        figures: number of pictures that must be on the page.
    """

    name: str
    path: str
    shows: str
    figures: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    server = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    if not server:
        sys.exit("PREFECT_API_URL is not set. Start `prefect server start` and set it to its URL.")
    pages = pages_of_search(arguments.folder)
    missing = missing_on(pages, server, arguments.folder, arguments.chromium)
    print("\n".join(missing) or f"wrote {len(pages)} pages to {arguments.folder}; inspect them")
    sys.exit(bool(missing))


def pages_of_search(folder: Path) -> list[Page]:
    """Run a search twice and deploy it; return the pages that show it."""
    settings = Search.model_validate(
        small_search(folder / "model") | {"betas": [0.01, 0.02, 0.03, 0.05, 0.07]}
    )
    runtime = SearchRuntime(store=str(folder / "store"))
    deployment = deploy(search, None, "screenshots")
    pages = [
        Page(
            "form",
            f"deployments/deployment/{deployment}/run",
            "Fraction of the weights of all decoder linears",
        )
    ]
    for name, says in (("first", "built now"), ("cached", "Everything was in the store already")):
        state = search(settings, runtime, return_state=True)
        run, verdict = state.state_details.flow_run_id, state.result().selection.verdict
        with get_client(sync_client=True) as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter.model_validate({"flow_run_id": {"any_": [run]}})
            )
        artifact = {each.key: f"artifacts/artifact/{each.id}" for each in found}
        pages += [
            Page(f"{name}-run", f"runs/flow-run/{run}?tab=Logs", settings.title),
            Page(
                f"{name}-tasks", f"runs/flow-run/{run}?tab=TaskRuns", f"branch {settings.title}: beta 0, 0.01"
            ),
            Page(f"{name}-artifacts", f"runs/flow-run/{run}?tab=Artifacts", "search-report"),
            Page(f"{name}-report", artifact["search-report"], says, figures=2),
            Page(f"{name}-table", artifact["search-result"], verdict),
            Page(f"{name}-model", artifact["pruned-model"], "from_pretrained"),
        ]
    return pages


def missing_on(pages: list[Page], server: str, folder: Path, chromium: str) -> list[str]:
    """Write every page to a PNG file; return the missing texts and figures."""
    from playwright.sync_api import sync_playwright

    problems = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, args=FLAGS.split()
        )
        tab = browser.pages[0]
        for page in pages:
            tab.set_viewport_size({"width": WIDTH, "height": HEIGHT})
            tab.goto(f"{server}/v2/{page.path}")
            tab.wait_for_timeout(SETTLED)
            unfold(tab)
            tab.screenshot(path=folder / f"{page.name}.png")
            if page.shows not in tab.inner_text("body"):
                problems.append(f"{page.name}: {page.shows!r} is not on the page")
            if (figures := tab.evaluate(DRAWN_FIGURES)) != page.figures:
                problems.append(f"{page.name}: {figures} figures are drawn, not {page.figures}")
        browser.close()
    return problems


def unfold(tab: Any) -> None:
    """Make the window as high as the scrollable content."""
    height = tab.evaluate("Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))")
    tab.set_viewport_size({"width": WIDTH, "height": min(max(height, HEIGHT), TALLEST)})
    tab.wait_for_timeout(SETTLED // 3)


if __name__ == "__main__":
    main()
