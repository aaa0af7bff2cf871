"""Fixtures for whole searches: a tiny model, a text, and one finished search."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from layerwise.flows.pipeline.result import SearchResult
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.tasks.charts import drawing

WORDS = [f"w{number}" for number in range(96)]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 97}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Workshop:
    """A folder with a model (LLaMA with three layers), models that a search refuses, and a text of 2000 words."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    def parameters(self, **changes) -> dict:
        """Return the settings of a small search, as plain JSON."""
        text = str(self.text)
        small = {"calibration_windows": 6, "selection_windows": 4, "test_windows": 3, "seqlen": 16}
        texts = {"calibration": text, "selection": text}
        model = {"model": str(self.model), "sparsity": 0.5, "betas": [0.1, 0.25]}
        return model | texts | small | changes

    def settings(self, **changes) -> Search:
        return Search.model_validate(self.parameters(**changes))


@pytest.fixture(scope="session", autouse=True)
def small_pictures() -> Iterator[None]:
    """Draw PNGs at half their size, which saves half a second of each search; tests of single figures draw them in full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "PIXELS", drawing.PIXELS / 2)
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    words = {"<unk>": 0} | {word: number for number, word in enumerate(WORDS, 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    models = {
        "model": LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, initializer_range=0.2)),
        "short": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=8)),
        "recurrent": RwkvForCausalLM(
            RwkvConfig(vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=3)
        ),
        "narrow": LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 50}, **HEADS)),
        "mute": LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        if name != "mute":
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
                folder / name
            )
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return Workshop(folder)


@pytest.fixture(scope="session")
def finished(workshop, prefect_backend, tmp_path_factory) -> tuple[SearchResult, SearchRuntime]:
    """A search that built everything in an empty store, and its runtime. Tests may add to the store, not remove from it."""
    folder = tmp_path_factory.mktemp("finished")
    runtime = SearchRuntime(store=str(folder / "store"))
    result = search(workshop.settings(), runtime)
    shutil.copytree(folder / "store", folder / "untouched")
    return result, runtime


@pytest.fixture
def untouched_store(finished, tmp_path) -> Path:
    """A store with the artifacts of the finished search only, whatever other tests have added to the common one."""
    return Path(shutil.copytree(Path(finished[1].store).with_name("untouched"), tmp_path / "untouched"))


@pytest.fixture
def run_search(prefect_backend, workshop, finished) -> Callable[..., SearchResult]:
    """Return a function that runs a search with changed settings, by default in the store of the finished search."""

    def run(store: str | None = None, **changes) -> SearchResult:
        runtime = finished[1] if store is None else SearchRuntime(store=store)
        return search(workshop.settings(**changes), runtime)

    return run
