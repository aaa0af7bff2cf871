"""Small models in folders and on a local hub, and the stages that prune them."""

import json
import os
import pkgutil
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Gemma4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from layerwise.allocators.atp import arithmetic
from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear
from layerwise.models.streaming import StreamedModel
from layerwise.pruners.wanda import Wanda
from layerwise.storage.artifact import Artifact
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.storage.tensors import write_tensors
from layerwise.tasks.branch import branch
from layerwise.tasks.capture import CaptureSettings, Retention, capture
from layerwise.tasks.capture_grams import capture_grams
from layerwise.tasks.evaluate import evaluate
from layerwise.tasks.export import export
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lanes.lane_group import LaneInputs, LayerWatch
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import layer_sizes_of, linears_by_layer
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.texts.token_windows import TOKENS_FILE, read_input_ids
from tests.lm_task_files import give_words, some_documents, write_task
from tests.tiny_configs import tiny_config

COMMIT = "c0ffee" * 6 + "beef"


def small_llama(**settings) -> LlamaForCausalLM:
    """Return a random model of two layers with a vocabulary of 97."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(shape | heads | settings)))


@pytest.fixture
def local_store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    return small_llama


@pytest.fixture
def save_model(tmp_path) -> Callable[..., Path]:
    """Save a model (by default a small LLaMA) with a tokenizer into a new folder."""

    def save(model: PreTrainedModel | None = None, name: str = "model", **options) -> Path:
        folder = tmp_path / name
        (model or small_llama()).save_pretrained(folder, **options)
        words = {"<unk>": 0, "hello": 1, "world": 2}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def edit_tensors() -> Callable[[Path, Callable[[dict], None]], None]:
    """Change the tensors in ``model.safetensors`` of a folder."""

    def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change entries of ``config.json`` of a folder."""

    def edit(folder: Path, **changes) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(document | changes))

    return edit


@pytest.fixture
def equals_transformers() -> Callable[[Checkpoint, Path], None]:
    """Compare every tensor of a checkpoint with the one that transformers reads from a GGUF file."""

    def compare(checkpoint: Checkpoint, path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        expected = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del expected["lm_head.weight"]
        weights = dict(checkpoint.read(checkpoint.outer_tensors()))
        for number, layer in enumerate(checkpoint.layers()):
            weights |= {f"model.layers.{number}.{name}": weight.clone() for name, weight in layer.items()}
        assert set(weights) == set(expected)
        assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []

    return compare


class Hub:
    """The part of the Hugging Face Hub's HTTP interface that an import uses, for one repository.

    Attributes:
        folder: the files of ``tiny/llama``.
        bytes_sent: bytes of files sent so far.
        requests: method and path of every request.
        out_of_order: called before every file is sent; True makes the request fail.
        gated: whether files need the token ``secret-token``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_sent, self.gated = 0, False
        self.out_of_order: Callable[[], bool] = lambda: False
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_HubRequest,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, name="hub", daemon=True).start()


class _HubRequest(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        allowed = not self.hub.gated or self.headers.get("Authorization") == "Bearer secret-token"
        if not re.match(r"(/api/models)?/tiny/llama(/|$)", path):
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif match := re.fullmatch(r"/api/models/tiny/llama(?:/revision/(.+))?", path):
            known = match[1] in (None, "main", COMMIT)
            answer = {"id": "tiny/llama", "_id": "1", "sha": COMMIT, "tags": [], "siblings": []}
            self._json(200, answer) if known else self._unknown_revision()
        elif match := re.fullmatch(rf"/api/models/tiny/llama/tree/{COMMIT}(?:/(.+))?", path):
            files = sorted((self.hub.folder / (match[1] or "")).iterdir())
            tree = [
                {
                    "type": "directory" if f.is_dir() else "file",
                    "path": str(f.relative_to(self.hub.folder)),
                    "size": f.stat().st_size,
                    "oid": f"oid{f.name}",
                }
                for f in files
            ]
            self._json(200, tree)
        elif match := re.fullmatch(rf"/tiny/llama/resolve/{COMMIT}/(.+)", path):
            self._file(self.hub.folder / match[1]) if allowed else self._gated()
        else:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def _file(self, file: Path) -> None:
        if self.hub.out_of_order():
            self._json(418, {"error": "out of order"})
            return
        content, status = file.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content, status = content[int(wanted[1]) : int(wanted[2]) + 1], 206
        self.hub.bytes_sent += len(content)
        self._send(status, content, {"Content-Type": "application/octet-stream", "ETag": '"etag"'})

    def _gated(self) -> None:
        self._json(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})

    def _unknown_revision(self) -> None:
        self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})

    def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(
            status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {})
        )

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(save_model, monkeypatch) -> Iterator[Hub]:
    """Start a hub with the model ``tiny/llama`` in several shards, and set the environment to use it."""
    from huggingface_hub import HfFileSystem

    hub = Hub(save_model(name="on-the-hub", max_shard_size="30KB"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    for name in [name for name in os.environ if name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]:
        monkeypatch.delenv(name)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    HfFileSystem.clear_instance_cache()


@dataclass(frozen=True)
class SmallRun:
    """A small checkpoint and windows of random tokens in a store, and the stages of a search."""

    store: ArtifactStore
    folder: Path
    checkpoint: Checkpoint
    windows: Mapping[str, Artifact]  # by role
    pruning: PruneSettings
    linears: Sequence[Sequence[Linear]]

    def input_ids(self, role: str) -> torch.Tensor:
        return read_input_ids(self.store, self.windows[role])

    def transformers_model(self, folder: Path | None = None) -> PreTrainedModel:
        """Open the checkpoint, or the one in ``folder``, with transformers, in the dtype of the run."""
        dtype = getattr(torch, self.pruning.dtype)
        return AutoModelForCausalLM.from_pretrained(folder or self.folder, dtype=dtype).eval()

    def capture(self, retention: Retention = "none", **execution) -> Artifact:
        settings = CaptureSettings(self.pruning.dtype, retention)
        calibration, selection = self.windows["calibration"], self.windows["selection"]
        where = Execution(**execution)
        return capture.fn(self.store, self.checkpoint, calibration, selection, settings, where)

    def plans(self, betas: Sequence[float]) -> tuple[SparsityPlan, ...]:
        sizes = layer_sizes_of(self.pruning.prunable(self.linears))
        return tuple(arithmetic(self.pruning.target, beta, sizes) for beta in betas)

    def inputs(self, scored: str = "selection") -> LaneInputs:
        windows = self.windows["calibration"], self.windows[scored]
        return LaneInputs(self.checkpoint, self.capture(), *windows, self.grams())

    def grams(self, **execution) -> Artifact | None:
        """Capture second moments if the pruner needs them."""
        if not self.pruning.needs_grams:
            return None
        inputs = self.store, self.checkpoint, self.windows["calibration"], self.pruning.dtype
        return capture_grams.fn(*inputs, Execution(**execution), with_sums=self.pruning.needs_sums)

    def branch(self, *betas: float, **execution) -> list[LaneScore]:
        plans, where = self.plans(betas), Execution(**execution)
        return branch.fn(self.store, self.inputs(), plans, self.linears, self.pruning, where)

    def exported_model(self, lane: LaneScore) -> PreTrainedModel:
        """Export a lane, and open it with transformers."""
        return self.transformers_model(Path(self.store.location(self.export(lane))))

    def losses(self, model: PreTrainedModel, role: str) -> list[float]:
        """Return the loss per window as computed by transformers."""
        with torch.no_grad():
            return [model(input_ids=i[None], labels=i[None]).loss.item() for i in self.input_ids(role)]

    def export(self, chosen: LaneScore, uniform: LaneScore | None = None, **execution) -> Artifact:
        lanes = chosen, uniform or chosen
        where = Execution(**execution)
        return export.fn(self.store, self.inputs(), *lanes, self.linears, self.pruning, where)

    def export_and_test(self, uniform: LaneScore, best: LaneScore, **execution) -> tuple[Artifact, Artifact]:
        """Export the best lane and test both in one pass over the weights."""
        where, plans = Execution(**execution), (uniform.plan, best.plan)
        rest = self.linears, self.pruning, where

        def run_test(watch: LayerWatch, where: Execution) -> Artifact:
            return evaluate.fn(
                self.store, self.inputs("test"), *plans, self.linears, self.pruning, where, watch=watch
            )

        exported = export.fn(self.store, self.inputs(), best, uniform, *rest, beside=run_test)
        return exported, evaluate.fn(self.store, self.inputs("test"), *plans, *rest)

    def evaluate(self, uniform: float, best: float, **execution) -> Artifact:
        plans, where = self.plans((uniform, best)), Execution(**execution)
        return evaluate.fn(self.store, self.inputs("test"), *plans, self.linears, self.pruning, where)

    def errors(self, beta: float = 0.0) -> list[float]:
        """Return the reconstruction errors of a plan by layer, on the test windows."""
        table = read_table(
            self.store, self.evaluate(0.0, beta), f"{'best' if beta else 'uniform'}/layers.parquet"
        )
        return table["error"].to_pylist()

    def files(self) -> set[str]:
        """Return every file in the store."""
        return set(self.store.fs.find(self.store.root))


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Change weights, norms and biases of ``model`` enough that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def run_of(
    store: ArtifactStore, folder: Path, windows: Mapping[str, int] | None = None, **pruning
) -> SmallRun:
    """Import the model in ``folder`` and make windows of 12 tokens for each role."""
    checkpoint = import_checkpoint(store, str(folder))
    artifacts = {
        role: _random_windows(store, role, count, checkpoint.config.get_text_config().vocab_size)
        for role, count in ({"calibration": 5, "selection": 3, "test": 2} | (windows or {})).items()
    }
    defaults = {"target": 0.5, "pruner": Wanda(), "calibration_mode": "dense"}
    settings = PruneSettings(**(defaults | {"dtype": checkpoint.index.dtype} | pruning))
    return SmallRun(store, folder, checkpoint, artifacts, settings, linears_by_layer(checkpoint.index, 8))


@pytest.fixture
def small_run(local_store, save_model) -> Callable[..., SmallRun]:
    """Import a small model (a LLaMA of three layers) and make windows of 12 tokens for each role."""

    def make(
        model: PreTrainedModel | Path | None = None,
        store: ArtifactStore = local_store,
        max_shard_size: str = "1GB",
        windows: Mapping[str, int] | None = None,
        **pruning,
    ) -> SmallRun:
        if not isinstance(model, Path):
            model = lively(model or small_llama(num_hidden_layers=3, initializer_range=0.2))
            model = save_model(model, max_shard_size=max_shard_size)
        return run_of(store, model, windows, **pruning)

    return make


def _random_windows(store: ArtifactStore, role: str, windows: int, vocabulary: int) -> Artifact:
    generator = torch.Generator().manual_seed(len(role))
    input_ids = torch.randint(vocabulary, (windows, 12), generator=generator)
    return store.get_or_build(
        Stage("sample_tokens", 1, f"random tokens: {role}, {windows} windows"),
        lambda draft: write_tensors(draft, TOKENS_FILE, {"input_ids": input_ids}),
    )


@pytest.fixture
def another_store() -> Callable[[], ArtifactStore]:
    """Return a function that makes an empty store."""
    return lambda: ArtifactStore(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def computed_layers(monkeypatch) -> list[int]:
    """Record the index of every decoder layer that is computed, in order."""
    computed: list[int] = []
    loaded = StreamedModel.loaded

    def counted(model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor]):
        computed.append(index)
        return loaded(model, index, weights)

    monkeypatch.setattr(StreamedModel, "loaded", counted)
    return computed


class MachineDied(Exception):
    """Stands for any interruption of a run."""


@pytest.fixture
def dying_at(monkeypatch) -> Callable[[str, int], AbstractContextManager]:
    """Run a block that ends with an error at the given call of a function, named by its dotted path."""

    @contextmanager
    def run(function: str, call: int) -> Iterator[None]:
        original, calls = pkgutil.resolve_name(function), count(1)

        def dying(*arguments, **options):
            if next(calls) == call:
                raise MachineDied
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(function, dying)
            with pytest.raises(MachineDied):
                yield

    return run


@pytest.fixture
def folder_of(save_model) -> Callable[..., Path]:
    """Save a small model of a family, with a tokenizer for the words of the tasks."""

    shape = {
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    }

    def save(family: str = "llama") -> Path:
        if family == "opt":
            model: PreTrainedModel = OPTForCausalLM(
                OPTConfig(hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, **shape)
            )
        elif family == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_positions=64, **shape))
        elif family == "gemma4":
            model = Gemma4ForCausalLM(tiny_config("gemma4_text"))
        else:
            model = small_llama(num_hidden_layers=3, initializer_range=0.2)
        return give_words(save_model(lively(model), name=family))

    return save


@pytest.fixture
def lm_tasks(tmp_path) -> list[str]:
    """Write two tasks of twelve documents each, and return the paths of their files."""
    return [write_task(tmp_path, name, some_documents(12, seed)) for seed, name in enumerate(("one", "two"))]
