"""Tables of the ATP paper (Huang et al., ICML 2025, arXiv:2502.14770) as settings of a comparison.

Table numbers are those of the ICML version; in arXiv version 1, the Bayesian search is Table 5. A setting that the sources
of this project do not state is named in the table's remarks. Numbers that they do not state are missing, never estimated.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# The models of the paper, as named there; the help names them.
MODELS = (
    "LLaMA 7B/13B/30B/65B, LLaMA-2 7B/13B/70B, LLaMA-3-8B, LLaMA-3.1-8B, LLaMA-3.2 1B/3B, OPT-13B, Vicuna-13B, Qwen2.5-7B, "
    "Mistral-7B, Mixtral-8x7B"
)
# Wanda's tasks, with piqa instead of rte.
ZERO_SHOT = "boolq,arc_easy,arc_challenge,hellaswag,winogrande,openbookqa,piqa"
NAME, DEFAULT_TABLE = "atp-paper", "3"
# An option of one value, for each list of the preset that it replaces.
ONE_OF = {"sparsities": "sparsity", "pruners": "pruner", "allocators": "allocator", "seeds": "seed"}
# As in every table: 128 calibration sequences of 2048 tokens of C4, perplexity on WikiText-2, all betas of the grid.
COMMON: Mapping[str, str] = {
    "calibration": "c4",
    "calibration_windows": "128",
    "selection": "wikitext2",
    "selection_windows": "",  # all
    "seqlen": "2048",
    "seed": "0",
    "strategy": "grid",
}
BASELINES = "atp,owl,dsa,alpha_pruning"
# What differs from the paper on purpose, in every table.
DIFFERENCES = (
    'A search chooses between uniform and the plans of its allocator. Where "best" is 0, "test: best" is that of uniform, not of '
    'the allocator as in the paper; "not uniform, on selection" is the perplexity of the best other plan on the selection windows.',
    "Plans are chosen on the validation split of WikiText-2; the paper's code chooses beta on the test split that it reports.",
    "The overall sparsity is exact to the weight; the paper's code rounds down in every row, or removes equal scores too.",
    "One capture of the dense model calibrates all plans; the paper's code calibrates every plan on its own pruned layers. "
    "With wanda and magnitude, --calibration-mode sequential does the same.",
    "Computed in the checkpoint's dtype; the paper's code uses float16.",
)


@dataclass(frozen=True)
class PaperTable:
    """Settings of one table.

    Attributes:
        about: what the table compares.
        options: options of ``layerwise compare`` as text, in addition to ``COMMON``.
        remarks: what else differs, and what the sources do not state.
    """

    about: str
    options: Mapping[str, str]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedNumber:
    """A number of a paper.

    Attributes:
        model: name of the model, a key of ``ALIASES``.
        allocator: title of the allocation in a comparison; "uniform" without one.
        source: paper and place, where they are known.
        perplexity: on WikiText-2; None if only the accuracy is known.
        accuracy: average over the seven zero-shot tasks, in per cent; None if only the perplexity is known.
    """

    model: str
    sparsity: float
    pruner: str
    allocator: str
    source: str
    perplexity: float | None = None
    accuracy: float | None = None


_STEPS = (0.001, 0.002, 0.004, 0.008)
_BY_LINEAR = [
    "atp",
    {"allocator": "global", "granularity": "linear"},
    "er",
    "er_plus",
    {"allocator": "lamp", "granularity": "linear"},
]
_BASELINES_STATED = (
    "The sources name the baselines owl, dsa and alpha_pruning, but not which of them this table has."
)

TABLES: Mapping[str, PaperTable] = {
    "1": PaperTable(
        "zero-shot accuracy at 70 %",
        {"sparsities": "0.7", "pruners": "wanda,sparsegpt", "allocators": BASELINES, "tasks": ZERO_SHOT},
        (
            _BASELINES_STATED,
            "For 65B and 70B models, the paper answers the first 2000 documents of every task.",
        ),
    ),
    "2": PaperTable(
        "perplexity at 70 %",
        {"sparsities": "0.7", "pruners": "wanda,sparsegpt", "allocators": BASELINES},
        (
            "The sources do not describe Table 2. These are the settings of Table 3 at 70 %, with both of the paper's pruners.",
        ),
    ),
    "3": PaperTable(
        "perplexity from 50 to 80 %",
        {"sparsities": "0.5,0.6,0.7,0.8", "pruners": "wanda", "allocators": BASELINES},
        (_BASELINES_STATED,),
    ),
    "4": PaperTable(
        "other architectures at 70 %",
        {"sparsities": "0.7", "pruners": "wanda", "allocators": BASELINES, "tasks": ZERO_SHOT},
        ("The sources state the models of Table 4 (among them Mixtral), but not its other settings.",),
    ),
    "5": PaperTable(
        "step of the grid of betas at 70 %",
        {
            "sparsities": "0.7",
            "pruners": "wanda",
            "allocators": json.dumps([{"allocator": "atp", "beta_step": step} for step in _STEPS]),
        },
        (
            "The sources state that coarser steps than 0.002 lose perplexity and finer ones gain little, but not the steps: "
            f"{', '.join(map(str, _STEPS))} are tried.",
        ),
    ),
    "6": PaperTable(
        "Bayesian search over all layers at 70 %, on LLaMA-2-7B",
        {
            "sparsities": "0.7",
            "pruners": "wanda",
            "allocators": json.dumps(["atp", {"allocator": "atp", "strategy": "bayesian"}]),
        },
        (
            "The paper's search took 33 hours (about 1000 trials); here it has 64 trials. Give more in --allocators "
            '(\'["atp", {"strategy": "bayesian", "trials": 1000}]\').',
        ),
    ),
    "9": PaperTable(
        "GSM8K (8-shot) at 40 % and MMLU (5-shot) at 60 %",
        {
            "sparsities": "0.4,0.6",
            "pruners": "wanda",
            "allocators": BASELINES,
            "tasks": "gsm8k,mmlu",
            "way": "memory",
        },
        (_BASELINES_STATED, "Both tasks are run at both sparsities."),
    ),
    "14": PaperTable(
        "uniform, global, Erdos-Renyi and LAMP at 70 %",
        {"sparsities": "0.7", "pruners": "wanda", "allocators": json.dumps(_BY_LINEAR)},
        (
            "The sources do not state the model and the sparsity of Table 14.",
            "er_plus keeps the last linear of the last layer dense; the paper does not say what its last layer is.",
        ),
    ),
    "15": PaperTable(
        "other pruners at 70 %",
        {"sparsities": "0.7", "pruners": "dsnot,alps", "allocators": "atp"},
        (
            "Pruner-Zero, the third pruner of Table 15, is not available. Published numbers are those of the ALPS paper "
            "(five calibration samples), as the ATP paper's are not known.",
        ),
    ),
}

ALIASES: Mapping[str, tuple[str, ...]] = {  # last parts of hub ids and folders, in lower case
    "LLaMA-7B": ("llama-7b", "llama-7b-hf"),
    "LLaMA-2-7B": ("llama-2-7b", "llama-2-7b-hf"),
    "LLaMA-2-13B": ("llama-2-13b", "llama-2-13b-hf"),
    "LLaMA-3-8B": ("meta-llama-3-8b", "llama-3-8b", "llama-3-8b-hf"),
}

_TEXT = "ATP paper, abstract and text"  # the differences stated there, added to or subtracted from 22.16
_QUOTED = "ATP paper, table not known (quoted by others)"
_ALPS = "ALPS paper (NeurIPS 2024)"
# At 80 %, sources disagree on whether 5889 (uniform), 698.56 (alpha_pruning) and 176.80 (atp) are LLaMA-7B's or
# LLaMA-2-7B's, so they are left out.
PUBLISHED = (
    PublishedNumber("LLaMA-2-7B", 0.7, "wanda", "atp", "ATP paper, Table 6", perplexity=22.16),
    PublishedNumber("LLaMA-2-7B", 0.7, "wanda", "atp+bayesian", "ATP paper, Table 6", perplexity=22.10),
    PublishedNumber("LLaMA-2-7B", 0.7, "wanda", "uniform", _TEXT, perplexity=74.26),
    PublishedNumber("LLaMA-2-7B", 0.7, "wanda", "alpha_pruning", _TEXT, perplexity=28.87),
    PublishedNumber("LLaMA-7B", 0.7, "wanda", "uniform", _QUOTED, perplexity=84.52, accuracy=37.45),
    PublishedNumber("LLaMA-7B", 0.7, "wanda", "owl", _QUOTED, perplexity=24.56),
    PublishedNumber("LLaMA-7B", 0.7, "wanda", "atp", _QUOTED, perplexity=20.16, accuracy=47.03),
    PublishedNumber("LLaMA-2-7B", 0.7, "dsnot", "uniform", _ALPS, perplexity=63.12),
    PublishedNumber("LLaMA-2-13B", 0.7, "dsnot", "uniform", _ALPS, perplexity=47.21),
    PublishedNumber("LLaMA-3-8B", 0.7, "dsnot", "uniform", _ALPS, perplexity=108.7),
    PublishedNumber("LLaMA-2-7B", 0.7, "alps", "uniform", _ALPS, perplexity=19.31),
    PublishedNumber("LLaMA-2-13B", 0.7, "alps", "uniform", _ALPS, perplexity=14.23),
    PublishedNumber("LLaMA-3-8B", 0.7, "alps", "uniform", _ALPS, perplexity=30.53),
)


def preset_options(preset: str, table: str | None, given: Collection[str]) -> dict[str, str]:
    """Return the options of a table that are not given, as text.

    Args:
        preset: "atp-paper".
        table: number of the table; None for Table 3.
        given: names of the options with a value of their own. One value replaces a list: ``sparsity`` replaces
            ``sparsities``.

    Raises:
        ValueError: there is no such preset, or no such table; or an option has one value where the table compares several.
    """
    if preset != NAME:
        raise ValueError(f"preset is {preset!r}; the only preset is {NAME}. Give this one, or none.")
    number = table or DEFAULT_TABLE
    if number not in TABLES:
        raise ValueError(
            f"table is {number!r}; the preset {NAME} has the tables {', '.join(TABLES)}. Give one of these, or none for "
            f"Table {DEFAULT_TABLE}."
        )
    options = {**COMMON, **TABLES[number].options}
    replaced = {"allocators", "allocator"} & set(given)
    if varied := [] if replaced else sorted(_varied(options["allocators"]) & set(given)):
        raise ValueError(
            f"{varied[0]} is given, but the allocations of Table {number} have {varied[0]} settings of their own. Give your "
            f"own allocators ({options['allocators']} in this table), or leave {varied[0]} out."
        )
    return {name: text for name, text in options.items() if not {name, ONE_OF.get(name)} & set(given)}


def differences_from_published(settings: Mapping[str, object]) -> list[str]:
    """Return the names of settings that a published number does not have, because other ones were given.

    Args:
        settings: settings of a search by name. Plans may be searched in another way, with another seed.
    """
    expected = {name: text for name, text in COMMON.items() if name not in ("strategy", "seed")}
    expected |= {
        "test": "",
        "test_windows": "",
        "pattern": "",
        "exclude": "",
        "recover": "",
        "calibrate_on": "all",
    }
    return [
        name
        for name, text in expected.items()
        if ("" if settings[name] is None else str(settings[name])) != text
    ]


def _varied(allocators: str) -> set[str]:
    """Return the settings, besides the allocator, that the allocations of a table have of their own."""
    entries = json.loads(allocators) if allocators.startswith("[") else []
    return {name for entry in entries if isinstance(entry, dict) for name in entry} - {"allocator"}


def preset_notes(table: str | None) -> list[str]:
    """Return what a table compares, what differs from the paper, and what its sources do not state."""
    number = table or DEFAULT_TABLE
    return [
        f"ATP paper, Table {number}: {TABLES[number].about}.",
        *TABLES[number].remarks,
        *DIFFERENCES,
    ]


def find_published(model: str, sparsity: float, pruner: str, allocator: str) -> PublishedNumber | None:
    """Return the published number of a search or of its uniform plan; None if none is known.

    Args:
        model: hub id, folder or URL of the model; only its last part counts.
        allocator: title of the allocation; "uniform" for the uniform plan.
    """
    name = model.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    what = sparsity, pruner, allocator
    for number in PUBLISHED:
        if name in ALIASES[number.model] and what == (number.sparsity, number.pruner, number.allocator):
            return number
    return None
