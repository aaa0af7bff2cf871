"""The model card of an exported checkpoint: README.md in the form that the Hugging Face Hub reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

import yaml

from layerwise.sparse.speed import SpeedTable
from layerwise.tasks.pages.markdown import code, one_line, plain
from layerwise.tasks.results.speed_table import speed_rows, speed_sentence
from layerwise.tasks.results.summary import number
from layerwise.tasks.sources.source_license import License

HUB_MODEL = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(@.+)?")

LOAD_DENSE = """The zeros are stored as zeros, so that the files are as large as those of the dense model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
LOAD_COMPRESSED = """The zeros are not stored. With the package layerwise:

```python
from layerwise.tasks.compressed.checkpoint import load, unpack_checkpoint

model = load("path/to/this/folder")                             # a transformers model
unpack_checkpoint("path/to/this/folder", "path/to/new/folder")  # an ordinary checkpoint, with its zeros
```

`COMPRESSED.md` describes the files and has a loader of a few lines that needs nothing but torch and safetensors."""
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
    """One row of the table of results."""

    model: str  # "dense", "uniform" or "this model"
    text: str  # what it was measured on, e.g. "selection text"
    windows: int
    seqlen: int  # tokens of a window
    perplexity: float


@dataclass(frozen=True)
class ModelCard:
    """What a model card says.

    Attributes:
        base_model: hub id (``owner/name[@revision]``) of the dense model, or whatever it is called.
        license: of the base model; None if its files do not tell.
        pruner: method that chose the weights, e.g. "wanda".
        pattern: N:M, such as "2:4"; None for none.
        allocator: method that gave every layer its sparsity, e.g. "atp"; None where it is not known: then the card
            gives the numbers alone.
        layers: share of zeros among the pruned linears' weights of every decoder layer, first layer first.
        realised: the same of all layers together.
        results: in the order of the table; empty for a card without it.
        speed: on some machine's CPU; None if it was not measured before the card was written.

    Raises:
        ValueError: no layers, or a share outside of [0, 1].
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
                f"the model card of {self.base_model} has no layers. Give one sparsity for each."
            )
        if outside := [share for share in (*self.layers, self.realised) if not 0 <= share <= 1]:
            raise ValueError(
                f"the model card of {self.base_model} would say sparsities of {outside}, outside [0, 1]. "
                "Give shares of zeros."
            )

    @property
    def hub_id(self) -> str | None:
        """The base model on the hub, without a revision; None if it came from elsewhere."""
        match = HUB_MODEL.fullmatch(self.base_model)
        return match[1] if match else None


def model_card(card: ModelCard, form: Literal["dense", "compressed"]) -> str:
    """The text of README.md. Names of models and licences are those of whoever made them: each is text, and no more.

    Args:
        form: of the folder that the card lies in: with the zeros, as transformers loads it, or without.
    """
    pattern = "" if card.pattern is None else f" in the pattern {card.pattern}"
    by = "" if card.allocator is None else f", given by the allocator {card.allocator}"
    low, high = (100 * share for share in (min(card.layers), max(card.layers)))
    return f"""---
{_front_matter(card, form)}
---

# {plain(card.base_model)}, {100 * card.realised:.1f} % sparse

Made from {code(card.base_model)} by layerwise: one-shot pruning with {card.pruner}{pattern}. Of the weights of the
pruned linears {100 * card.realised:.2f} % are zero. Embeddings, norms and head are those of the base model.

## Plan

Every decoder layer has a sparsity of its own{by}: from {low:.1f} % to {high:.1f} %. `sparsity.json` has that of every
linear.

{_layer_table(card.layers)}

{_results(card.results)}{_speed(card.speed)}## How to load

{LOAD_DENSE if form == "dense" else LOAD_COMPRESSED}

## Licence

{_licence(card)}

## How to cite

layerwise is built around this paper:

{CITATION}
"""


def _front_matter(card: ModelCard, form: str) -> str:
    """YAML that means the same, whatever is in a name."""
    # Of a library the hub shows how to load the folder.
    entries: dict[str, object] = {"library_name": "transformers"} if form == "dense" else {}
    if card.hub_id is not None:
        entries["base_model"] = card.hub_id
    if card.license is not None:
        named = {"license": "identifier", "license_name": "name", "license_link": "link"}
        facts = card.license.facts
        entries |= {key: one_line(facts[field]) for key, field in named.items() if field in facts}
    methods = [method for method in (card.allocator, card.pruner) if method is not None]
    entries["pipeline_tag"] = "text-generation"
    entries["tags"] = ["pruning", "sparsity", "layerwise", *methods]
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text.rstrip("\n")


def _layer_table(layers: Sequence[float]) -> str:
    rows = [f"| {index} | {100 * share:.2f} |" for index, share in enumerate(layers)]
    return "\n".join(["| layer | zeros, % |", "|--:|--:|", *rows])


def _results(results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = [
        f"| {row.model} | {row.text} | {row.windows} x {row.seqlen} | {number(row.perplexity)} |"
        for row in results
    ]
    table = "\n".join(["| model | text | windows x tokens | perplexity |", "|:--|:--|--:|--:|", *rows])
    return f"""## Results

{table}

The plan was chosen on the selection text, which flatters this model a little there.

"""


def _speed(table: SpeedTable | None) -> str:
    if table is None:
        return ""
    rows = speed_rows(table)
    head = f"| {' | '.join(rows[0])} |\n|:--|{'--:|' * (len(rows[0]) - 1)}"
    lines = [f"| {' | '.join(plain(str(value)) for value in row.values())} |" for row in rows]
    return "\n".join(["## Speed", "", plain(speed_sentence(table)), "", head, *lines, "", ""])


def _licence(card: ModelCard) -> str:
    applies = f"That of {code(card.base_model)} applies"
    if card.license is None:
        return f"{applies}; the files that it was read from do not tell which one it is."
    # Encoded, as a space or a bracket would end the link.
    link = "" if card.license.link is None else f" (<{quote(card.license.link, safe=':/?&=#%+,;@~')}>)"
    return f"{applies}: {plain(card.license.title)}{link}."
