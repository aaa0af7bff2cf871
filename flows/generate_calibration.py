"""Generate calibration: let the dense model write the text that it is then calibrated on."""

from typing import Literal

from prefect import flow
from pydantic import Field

from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.text_windows import require_known_ids
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import BareUrl, Settings
from layerwise.models.skeleton import positions_of
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.generation.generate_calibration import generate_calibration as generate
from layerwise.tasks.generation.generation_settings import GenerationSettings
from layerwise.tasks.generation.prompts import read_prompts
from layerwise.tasks.import_checkpoint import import_checkpoint, import_stage, inspect_source
from layerwise.tasks.models.tokenizer import tokenizer_of_source
from layerwise.tasks.results.run_names import title_of
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sources.model_config import config_from_document
from layerwise.tasks.texts.corpora import open_corpus


class GenerateCalibration(Settings):
    """Let the dense model answer prompts, and keep the answers as a text for calibration."""

    model: BareUrl = Field(description="Model that writes, usually the one to prune; as for a search.")
    prompts: BareUrl = Field(
        description="Text with the prompts; the same choices as for calibration, except a mix. Of a conversation, the model "
        "writes the last response again; a plain text is continued."
    )
    documents: int | None = Field(
        title="Number of prompts",
        default=None,
        ge=1,
        description="Number of prompts to answer, from the first one. Empty rows, and rows that are too long for the "
        "model's context, are skipped and not counted. Empty: all, up to 16 Mi characters.",
    )
    max_tokens: int = Field(
        title="Maximum length of a response",
        default=512,
        ge=1,
        le=2**20,
        description="Maximum length of a response, in tokens.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description="Temperature of the softmax that tokens are drawn from. 1: as the model predicts. 0: always the most "
        "likely token.",
    )
    batch: int = Field(
        title="Prompts per forward pass",
        default=8,
        ge=1,
        le=10_000,
        description="Number of prompts that are answered together. More are faster and need more memory.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the draws.")
    way: Literal["memory", "streamed"] = Field(
        default="memory",
        description="How the model is run. memory: the whole model at once. streamed: one decoder layer at a time, for models "
        "that do not fit; every token is one pass over the weights, for all prompts together.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        title="Dtype of the computation",
        default="auto",
        description="Dtype that the model computes in; auto for the dtype of the checkpoint.",
    )

    @property
    def title(self) -> str:
        """Short description for lists of runs."""
        return f"{title_of(self.model)}: {title_of(self.prompts)}"


@flow(name="generate-calibration", flow_run_name="{settings.title}", persist_result=False)
def generate_calibration(settings: GenerateCalibration, runtime: Runtime) -> Artifact:
    """Let the dense model answer prompts. Safe to stop and start again.

    Returns:
        The artifact with the answers, see ``layerwise.tasks.generation.generate_calibration``.

    Raises:
        ValueError: The model or the prompts cannot be used, or there is too little memory for the model.
    """
    store, execution = runtime.open_store(), runtime.execution()
    return run_announced(
        store,
        f"generate-calibration: {settings.title}",
        lambda: rebuild_damaged(store, lambda: _generated(store, settings, execution)),
    )


def _generated(store: ArtifactStore, settings: GenerateCalibration, execution: Execution) -> Artifact:
    corpus = open_corpus(settings.prompts, "calibration")
    is_imported = store.find(import_stage(settings.model)) is not None
    checkpoint = import_checkpoint(store, settings.model) if is_imported else None
    index = inspect_source(settings.model) if checkpoint is None else checkpoint.index
    config = config_from_document(index.config, settings.model).get_text_config()
    context = positions_of(config)
    room = None if context is None else context - settings.max_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"max_tokens is {settings.max_tokens}, but the context of {settings.model} has {context} tokens, also for the "
            "prompt. Use fewer."
        )
    tokenizer = tokenizer_of_source(settings.model).load() if checkpoint is None else checkpoint.tokenizer()
    prompts = read_prompts(corpus, tokenizer, settings.documents, room)
    largest_id = max(max(prompt.token_ids) for prompt in prompts)
    require_known_ids(settings.model, corpus, largest_id, config.vocab_size)
    checkpoint = checkpoint or import_checkpoint(store, settings.model)
    dtype = index.dtype if settings.dtype == "auto" else settings.dtype
    how = GenerationSettings(
        dtype, settings.max_tokens, settings.temperature, settings.batch, settings.seed, settings.way
    )
    return generate(store, checkpoint, prompts, how, execution)
