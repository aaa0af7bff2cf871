"""The model card of an exported or compressed checkpoint: README.md in the format of the Hugging Face Hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import yaml

from layerwise.scoring.criterion import KL
from layerwise.scoring.perplexity import format_divergence, format_perplexity
from layerwise.sparse.speed import SpeedTable
from layerwise.tasks.pages.markdown import code, displayable, plain
from layerwise.tasks.results.speed_table import speed_rows, speed_sentence
from layerwise.tasks.sources.source_license import License

HUB_MODEL = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(@.+)?")

ON_TASKS = (
    "Accuracy in per cent by lm-eval's rules; this model is the best one. Differences are those of this model, with p-values of "
    "McNemar's test. Tokens: mean length of the generated answers, and how many were cut at their maximum length."
)
ON_TASKS_DISTILLED = (
    "Accuracy in per cent by lm-eval's rules; this model is the distilled one, and the best one is the model before the "
    "distillation. Distilled to best: distilled minus best. Distilled to dense: distilled minus dense. The other differences are those "
    "of the best one. p-values are of McNemar's test. Tokens: mean length of the generated answers, and how many were cut at their "
    "maximum length."
)
LOAD_DENSE = """The zeros are stored, so the files are as large as those of the dense model.

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
LOAD_COMPRESSED = """The zeros are not stored. The package layerwise loads the files:

```python
from layerwise.tasks.compressed.checkpoint import load, unpack_checkpoint

model = load("path/to/this/folder")                             # a transformers model
unpack_checkpoint("path/to/this/folder", "path/to/new/folder")  # an ordinary checkpoint, with its zeros
```

`COMPRESSED.md` describes the files, and has a short loader that needs only torch and safetensors."""
ON_SELECTION_TEXT = "The plan was chosen on the selection text, so this model's perplexity on that text is slightly optimistic."
BY_KL = f"The plan was chosen by the {KL} from the dense model, in nats per token, not by perplexity."
ON_HELD_OUT_TEXT = (
    "The distillation did not train on the held-out windows. They are from the text that it trained on, they decided when it "
    "stopped, and the pruning and the recovery before it may have used them. The test text had no part in any choice."
)
CITATION = """```bibtex
@inproceedings{huang2025determining,
  title     = {Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective},
  author    = {Huang, Weizhong and Zhang, Yuxin and Zheng, Xiawu and Chao, Fei and Ji, Rongrong},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2025},
  note      = {arXiv:2502.14770}
}
```"""


@dataclass(frozen=True)
class Result:
    """One row of the table of results.

    Attributes:
        model: "dense", "uniform" or "this model".
        text: text that was used, e.g. "selection text".
        seqlen: tokens per window.
    """

    model: str
    text: str
    windows: int
    seqlen: int
    perplexity: float


@dataclass(frozen=True)
class ResultByKL(Result):
    """One row of the table of results of a search by the criterion ``kl``.

    Attributes:
        kl: mean KL divergence from the dense model, in nats per token.
    """

    kl: float = 0.0


@dataclass(frozen=True)
class ModelCard:
    """The content of a model card.

    Attributes:
        base_model: hub id (``owner/name[@revision]``) of the dense model, or another name.
        license: licence of the base model; None if its files do not state one.
        pruner: method that chose the weights, e.g. "wanda".
        pattern: N:M pattern, such as "2:4"; None if the weights have none.
        allocator: method that set the sparsity of every layer, e.g. "atp"; None if it is not known, and the card does
            not name it.
        layers: share of zeros in the pruned linears of every decoder layer, first layer first.
        realised: share of zeros in the pruned linears of all layers.
        results: rows of the table of results; the card has no table if empty.
        speed: speed on the CPU of one machine; None if it was not measured before the card was written.

    Raises:
        ValueError: there are no layers, or a share is outside of [0, 1].
    """

    base_model: str
    license: License | None
    pruner: str
    pattern: str | None
    allocator: str | None
    layers: tuple[float, ...]
    realised: float
    results: tuple[Result, ...] = ()
    speed: SpeedTable | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(
                f"the model card of {self.base_model} has no layers. Give the sparsity of each layer."
            )
        if outside := [share for share in (*self.layers, self.realised) if not 0 <= share <= 1]:
            raise ValueError(
                f"the model card of {self.base_model} has the sparsities {outside}, which are outside of [0, 1]. "
                "Give shares of zeros."
            )

    @property
    def hub_id(self) -> str | None:
        """Hub id of the base model, without a revision; None if it is not from the hub."""
        match = HUB_MODEL.fullmatch(self.base_model)
        return match[1] if match else None


def model_card(
    card: ModelCard,
    form: Literal["dense", "compressed"],
    recovery: str = "",
    distillation: str = "",
    mix: Sequence[Mapping[str, Any]] = (),
    auto_class: str = "AutoModelForCausalLM",
    counted: str = "",
    tasks: Sequence[Mapping[str, str]] = (),
    experts: str = "",
    dense: str = "",
) -> str:
    """Return the text of README.md. Names of models and licences come from outside and are escaped.

    Args:
        form: form of the checkpoint next to the card: "dense" (with zeros, for transformers) or "compressed".
        recovery: section on the recovery of the remaining weights; empty without recovery.
        distillation: how the model was distilled after the pruning; empty if it was not.
        mix: texts of the calibration, see ``calibration_mix.published_rows``; empty if it was one text.
        auto_class: class of transformers that loads the model.
        counted: sentence on the calibration tokens that count; empty if all do.
        tasks: rows of the table of few-shot tasks, by title of the column; empty if there are none.
        experts: calibration tokens of the experts; empty if the model has none.
        dense: sentences on the linears that stay dense by default; empty if there are none.
    """
    pattern = "" if card.pattern is None else f" in the pattern {card.pattern}"
    by = "" if card.allocator is None else f", set by the allocator {card.allocator}"
    fitted = " and recovery of the remaining weights" if recovery else ""
    tokens = f"## Experts\n\n{plain(experts)}\n\n" if experts else ""
    training = f"## Distillation\n\n{plain(distillation)}\n\n" if distillation else ""
    note = ON_HELD_OUT_TEXT if distillation else "" if recovery else ON_SELECTION_TEXT
    low, high = (100 * share for share in (min(card.layers), max(card.layers)))
    return f"""---
{_front_matter(card, form)}
---

# {plain(card.base_model)}, {100 * card.realised:.1f} % sparse

This model was made from {code(card.base_model)} with layerwise, by one-shot pruning with {card.pruner}{pattern}{fitted}.
{100 * card.realised:.2f} % of the weights in the pruned linears are zero. Embeddings, norms and head are unchanged.

## Plan

Every decoder layer has its own sparsity{by}, from {low:.1f} % to {high:.1f} %. `sparsity.json` has the sparsity of
every linear.{f" {plain(dense)}" if dense else ""}

{_layer_table(card.layers)}

{_calibration(mix, counted)}{tokens}{recovery}{training}{_results(card.results, note)}{_tasks(tasks, ON_TASKS_DISTILLED if distillation else ON_TASKS)}{_speed(card.speed)}## How to load

{LOAD_DENSE.format(auto_class=auto_class) if form == "dense" else LOAD_COMPRESSED}

## Licence

{_licence(card)}

## How to cite

layerwise implements this paper:

{CITATION}
"""


def recovery_section(text: str, rows: Sequence[Mapping[str, object]]) -> str:
    """Return the section on the recovery of a model.

    Args:
        text: description of the recovery.
        rows: perplexities with and without recovery, see ``summary.recovery_rows``.
    """
    head = f"| {' | '.join(rows[0])} |\n|:--|{'--:|' * (len(rows[0]) - 1)}"
    lines = [f"| {' | '.join(plain(str(value)) for value in row.values())} |" for row in rows]
    return "\n".join(["## Recovery", "", plain(text), "", head, *lines, "", ""])


def _calibration(mix: Sequence[Mapping[str, Any]], counted: str) -> str:
    if not mix:
        return f"## Calibration\n\n{counted}\n\n" if counted else ""
    rows = [
        f"| {plain(row['corpus'])} | {row['windows']} x {row['seqlen']} | {100 * row['share']:.1f} | "
        f"{row['part_tokens'][0]} to {row['part_tokens'][1]} of {row['text_tokens']} | {row['text_sha256']} |"
        for row in mix
    ]
    table = "\n".join(
        [
            "| text | windows x tokens | share, % | drawn from tokens | SHA-256 of the text |",
            "|:--|--:|--:|--:|:--|",
            *rows,
        ]
    )
    return f"""## Calibration

The weights to remove were chosen on windows of {len(mix)} texts.

{table}

{f"{counted}{chr(10)}{chr(10)}" if counted else ""}"""


def _front_matter(card: ModelCard, form: str) -> str:
    """Return the YAML of the card. Names from outside are quoted."""
    # For a known library, the hub shows how to load the folder; transformers cannot load a compressed one.
    entries: dict[str, object] = {"library_name": "transformers"} if form == "dense" else {}
    if card.hub_id is not None:
        entries["base_model"] = card.hub_id
    if card.license is not None:
        named = {"license": "identifier", "license_name": "name", "license_link": "link"}
        facts = card.license.facts
        entries |= {key: displayable(facts[field]) for key, field in named.items() if field in facts}
    methods = [method for method in (card.allocator, card.pruner) if method is not None]
    entries["pipeline_tag"] = "text-generation"
    entries["tags"] = ["pruning", "sparsity", "layerwise", *methods]
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text.rstrip("\n")


def _layer_table(layers: Sequence[float]) -> str:
    rows = [f"| {index} | {100 * share:.2f} |" for index, share in enumerate(layers)]
    return "\n".join(["| layer | zeros, % |", "|--:|--:|", *rows])


def _results(results: Sequence[Result], note: str) -> str:
    if not results:
        return ""
    by_kl = any(isinstance(row, ResultByKL) for row in results)
    head = f"| model | text | windows x tokens | perplexity |{f' {KL} |' if by_kl else ''}"
    rows = [
        f"| {row.model} | {row.text} | {row.windows} x {row.seqlen} | {format_perplexity(row.perplexity)} |"
        + (f" {format_divergence(row.kl)} |" if isinstance(row, ResultByKL) else "")
        for row in results
    ]
    table = "\n".join([head, f"|:--|:--|--:|--:|{'--:|' if by_kl else ''}", *rows])
    note = f"{note} {BY_KL}".strip() if by_kl else note
    return f"""## Results

{table}

{note}
{chr(10) if note else ""}"""


def _tasks(rows: Sequence[Mapping[str, str]], note: str) -> str:
    if not rows:
        return ""
    head = f"| {' | '.join(rows[0])} |\n|:--|{'--:|' * (len(rows[0]) - 1)}"
    lines = [f"| {' | '.join(plain(value) for value in row.values())} |" for row in rows]
    return "\n".join(["## Tasks", "", note, "", head, *lines, "", ""])


def _speed(table: SpeedTable | None) -> str:
    if table is None:
        return ""
    rows = speed_rows(table)
    head = f"| {' | '.join(rows[0])} |\n|:--|{'--:|' * (len(rows[0]) - 1)}"
    lines = [f"| {' | '.join(plain(str(value)) for value in row.values())} |" for row in rows]
    return "\n".join(["## Speed", "", plain(speed_sentence(table)), "", head, *lines, "", ""])


def _licence(card: ModelCard) -> str:
    applies = f"The licence of {code(card.base_model)} applies"
    if card.license is None:
        return f"{applies}. Its files do not state which one it is."
    # Encoded, because a space or a bracket would end the link.
    link = "" if card.license.link is None else f" (<{quote(card.license.link, safe=':/?&=#%+,;@~')}>)"
    return f"{applies}: {plain(card.license.title)}{link}."
