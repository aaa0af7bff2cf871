"""Write docs/model-types.md: every type of language model of the installed transformers, tried with a tiny random model.

.venv/bin/python docs/make_model_types.py [TYPE ...]     # with types: only print their results
.venv/bin/python docs/make_model_types.py --check        # try all, and fail if the page would change
"""

import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the tests
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.model_types import Outcome, compare  # noqa: E402
from tests.tiny_configs import model_types  # noqa: E402

PAGE = Path(__file__).parent / "model-types.md"
HEAD = """# Types of models

Every type of language model of transformers {version}, tried with a tiny random model (float32, four or six layers, CPU). This page
is made by `docs/make_model_types.py`; do not edit it.

| result | types | meaning |
|---|--:|---|
| equal | {equal} | see below |
| refused | {refused} | refused before any work, for the reason in the table |
| not tested | {untested} | transformers does not build or load the tiny model, for the reason in the table |
| not decoder-only | {others} | encoders, encoder-decoders, and classes that are no language models by themselves |

**{share:.0f} % of the {decoders} decoder-only types are equal.** That means:

- the perplexity of the dense model is that of transformers' own forward pass (relative difference at most 1e-5);
- Wanda removes the weights with the lowest scores, computed from the inputs of the linears in transformers' own forward pass (of
  experts, only the number of removed weights is compared here; a test compares the masks of the experts of four types);
- the exported checkpoint is loaded by the model's own class, equals the model masked by hand, tensor by tensor, and has the
  perplexity that the search reports.

The windows are drawn from the whole tiny vocabulary, as text. A type may have variants that its default configuration
does not show, for example Gemma 4 without per-layer inputs; each model is checked again when it is imported. Linears that stay
dense are listed by the import, in `sparsity.json`, in the model card and in the report.

Made with `.venv/bin/python docs/make_model_types.py` in {minutes} minutes on two cores. With `--check` it fails if a result changes.
"""


def tried(model_type: str) -> Outcome:
    """Compare one type in a folder of its own."""
    with TemporaryDirectory() as folder:
        return compare(model_type, Path(folder))


def try_all(names: list[str]) -> dict[str, Outcome]:
    """Compare types, and print every result.

    Raises:
        SystemExit: a type is neither equal nor refused with a reason.
    """
    outcomes: dict[str, Outcome] = {}
    failed: list[str] = []
    for name in names:
        start = time.monotonic()
        try:
            outcomes[name] = tried(name)
            shown = f"{outcomes[name].result:17} {outcomes[name].reason}"
        except Exception:
            failed.append(name)
            shown = f"FAILED\n{traceback.format_exc()}"
        print(f"{name:24} {time.monotonic() - start:5.1f} s  {shown}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} types are neither equal nor refused with a reason: {', '.join(failed)}")
    return outcomes


def page(outcomes: dict[str, Outcome], minutes: int) -> str:
    """Return the page."""
    counts = Counter(outcome.result for outcome in outcomes.values())
    decoders = len(outcomes) - counts["not decoder-only"]
    head = HEAD.format(
        version=transformers.__version__,
        equal=counts["equal"],
        refused=counts["refused"],
        untested=counts["not tested"],
        others=counts["not decoder-only"],
        share=100 * counts["equal"] / decoders,
        decoders=decoders,
        minutes=minutes,
    )
    rows = [f"| `{name}` | {outcome.result} | {cell(outcome.reason)} |" for name, outcome in outcomes.items()]
    return "\n".join([head, "| type | result | reason |", "|---|---|---|", *rows, ""])


def cell(reason: str) -> str:
    return (
        re.sub(r"\s+", " ", reason)
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .removesuffix(" Use another model.")
    )


def results_of(text: str) -> list[str]:
    """Return the rows of a page."""
    return [line for line in text.splitlines() if line.startswith("| `")]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = [name for name in sys.argv[1:] if not name.startswith("-")]
    start = time.monotonic()
    outcomes = try_all(given or model_types())
    if given:
        return
    made = page(outcomes, round((time.monotonic() - start) / 60))
    if "--check" in sys.argv:
        changed = set(results_of(PAGE.read_text())) ^ set(results_of(made))
        sys.exit("\n".join(["changed:", *sorted(changed)]) if changed else 0)
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
