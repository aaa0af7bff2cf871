"""U-shape: perplexity of SmolLM2-135M by beta on WikiText-2, compared with reference figures.

    .venv/bin/python tests/benchmarks/perplexity_curve.py

Wanda, with 32 calibration windows of WikiText-2 validation and 32 windows of test, of 512 tokens each. Takes about ten
minutes on two cores. Exits with 1 if a figure differs. WikiText-2 is read from the hub or, without network access, from
--data, a folder whose offline_datasets.py writes it to a datasets cache.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

DENSE = 28.82
HALF = {0: 59.18, 0.002: 57.65, 0.004: 56.66, 0.006: 56.96, 0.008: 58.07, 0.012: 63.29, 0.016: 73.58}
# Betas of the paper's grid, from 0 to beyond the minimum.
SEVENTY = (0.0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder with offline_datasets.py, for a machine without network access"
    )
    parser.add_argument("--store", type=Path, default=Path(".layerwise/benchmarks"))
    arguments = parser.parse_args()
    environment = dict(os.environ)
    if arguments.data:
        environment |= offline_wikitext(arguments.data, arguments.store / "datasets")
    half = search(arguments.store, 0.5, tuple(HALF), environment)
    seventy = search(arguments.store, 0.7, SEVENTY, environment)

    perplexities = {row["beta"]: row["perplexity"] for row in half["rows"]}
    uniform, best = perplexities[0], min(perplexities, key=perplexities.__getitem__)
    checks = {
        f"dense {half['dense_perplexity']:.2f}: within 1 % of {DENSE}": abs(
            half["dense_perplexity"] / DENSE - 1
        )
        <= 0.01,
        f"best beta {best:g}: .004 to .006": 0.004 <= best <= 0.006,
        f"best {100 * (1 - perplexities[best] / uniform):.1f} % below uniform: at least 3.5 %": perplexities[
            best
        ]
        <= 0.965 * uniform,
    }
    for beta, expected in HALF.items():
        off = perplexities[beta] / expected - 1
        checks[
            f"S=.5, beta {beta:g}: {perplexities[beta]:.2f}, {100 * off:+.1f} % from {expected}: within 3 %"
        ] = abs(off) <= 0.03
    high = {row["beta"]: row["perplexity"] for row in seventy["rows"]}
    factor = high[0] / min(high.values())
    checks[f"S=.7, {high}: best {factor:.2f} times below uniform: at least 2.2"] = factor >= 2.2
    for check, passed in checks.items():
        print("ok  " if passed else "OFF ", check)
    sys.exit(not all(checks.values()))


def offline_wikitext(data: Path, cache: Path) -> dict[str, str]:
    """Return environment variables with which ``hf:Salesforce/wikitext`` is read from a local cache."""
    subprocess.run(
        [sys.executable, data / "offline_datasets.py", cache], check=True, stdout=subprocess.DEVNULL
    )
    return {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def search(store: Path, sparsity: float, betas: tuple[float, ...], environment: dict[str, str]) -> dict:
    """Score ``betas`` on the first 32 windows of the test split; return the table of ``select``.

    Only this benchmark uses the test split as selection text, because the reference figures were measured this way.
    """
    options = {
        "model": "demo",
        "sparsity": sparsity,
        "betas": ",".join(map(str, betas)),
        "calibration": "hf:Salesforce/wikitext:validation",
        "selection": "hf:Salesforce/wikitext:test",
        "test": "hf:Salesforce/wikitext:test",
        "calibration-windows": 32,
        "selection-windows": 32,
        "test-windows": 2,
        "seqlen": 512,
        "store": store,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, "-m", "layerwise", "search", *flags], check=True, env=environment)
    newest = max((store / "select").glob("*/*/selection.json"), key=lambda path: path.stat().st_mtime)
    found = json.loads(newest.read_text())
    assert tuple(row["beta"] for row in found["rows"]) == betas, "the newest selection is of another search"
    return found


if __name__ == "__main__":
    main()
