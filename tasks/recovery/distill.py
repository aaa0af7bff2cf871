"""Distill: train the kept weights of an exported model towards the dense model, and write it as a new checkpoint."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from layerwise.calibration.capture import embed_windows
from layerwise.models.hidden_states import batches
from layerwise.models.skeleton import Linear, auto_class
from layerwise.models.streaming import StreamedModel
from layerwise.models.streaming_check import layout_of
from layerwise.recovery.distillation import in_stored_dtype, window_order
from layerwise.scoring.perplexity import perplexity, window_losses
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.integrity import require_whole
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors, write_tensors
from layerwise.tasks.export import CARD_FILE, WEIGHTS_INDEX
from layerwise.tasks.import_checkpoint import open_exported
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import DTYPES, linears_by_layer, streamed_model
from layerwise.tasks.pages.model_card import ModelCard, model_card
from layerwise.tasks.pages.model_card_data import results_of_distillation
from layerwise.tasks.recovery.distillation_memory import distillation_memory
from layerwise.tasks.recovery.student import DistillSettings, Student, TaughtWindows
from layerwise.tasks.results.calibration_mix import counted_of_export, mix_of_export, text_name
from layerwise.tasks.results.distillation import (
    DISTILL_STAGE,
    DISTILLATION_FILE,
    Distillation,
    DistilledRow,
    HeldOutLoss,
)
from layerwise.tasks.results.evaluation import read_test
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.results.summary import sentences_on_dense_linears
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.checkpoint_files import SPARSITY_FILE, copied_files
from layerwise.tasks.texts.calibrate_on import CalibrateOn, only_if_masked
from layerwise.tasks.texts.token_windows import read_counted, read_input_ids


@dataclass(frozen=True)
class DistillInputs:
    """What a distillation reads.

    Attributes:
        dense: the teacher.
        exported: the pruned checkpoint, an artifact of ``export``.
        calibration: windows to train on, and to hold out.
        test: test windows.
        tested: evaluation of the dense and the pruned model on the test windows.
        dtype: dtype that the search computes in.
        calibrate_on: tokens of the calibration windows that the training counts.
    """

    dense: Checkpoint
    exported: Artifact
    calibration: Artifact
    test: Artifact
    tested: Artifact
    dtype: str
    calibrate_on: CalibrateOn = "all"

    @property
    def text_name(self) -> str:
        """Name of the calibration text, for people. Equal tokens do not determine it."""
        name = text_name(self.calibration.facts)
        return name if self.calibrate_on == "all" else f"{name}; only the tokens of responses count"

    @property
    def training_dtype(self) -> str:
        """Dtype of the training. float16 would need a scaled loss; bfloat16 has the range of float32."""
        return "float32" if self.dtype == "float32" else "bfloat16"


def require_distillable(checkpoint: Checkpoint) -> None:
    """Refuse a model whose head needs more than hidden states.

    Raises:
        ValueError: the model carries several hidden states.
    """
    layout = layout_of(checkpoint.config, checkpoint.index.outer_shapes)
    if layout.kept or not layout.hidden.has_windows_first:
        raise ValueError(
            f"{checkpoint.config.model_type} uses more than one hidden state of each token after its last layer: distillation "
            "needs one. Search with --recover train instead, which trains one layer at a time."
        )


def distill_stage(
    inputs: DistillInputs, settings: DistillSettings, card: ModelCard, recovery: str = ""
) -> Stage:
    """Describe a distillation.

    Args:
        recovery: section of the model card on the recovery; empty without recovery.
    """
    by_role = {
        "checkpoint": inputs.dense.identity,
        "export": inputs.exported.key,
        "calibration": inputs.calibration.content,
        "test": inputs.test.content,
        "evaluate": inputs.tested.key,
    }
    own = {"distill": asdict(settings), "dtype": inputs.dtype, "card": card, "text": inputs.text_name}
    section = {"recovery": recovery} if recovery else {}
    return Stage(DISTILL_STAGE, 1, {**own, **section, **only_if_masked(inputs.calibrate_on)}, by_role)


@stage_task(about=lambda inputs, settings, **_: f"{model_title(inputs.dense)}, {settings.steps} steps")
def distill(
    store: ArtifactStore,
    inputs: DistillInputs,
    settings: DistillSettings,
    card: ModelCard,
    execution: Execution,
    recovery: str = "",
) -> Artifact:
    """Train the kept weights of the pruned linears, and write a folder that ``from_pretrained`` loads.

    Files, names and dtypes are those of ``inputs.exported``. All tensors except the pruned linears, the zeros in these,
    configuration, tokenizer and ``sparsity.json`` stay the same. ``distillation.json`` has the result.

    Args:
        card: model card of the exported model, without results.
        recovery: section of the model card on the recovery; empty without recovery.

    Raises:
        ValueError: there is too little memory for the whole model with gradients, or too few windows.
    """

    def build(draft: Draft) -> None:
        run = _Distillation(store, inputs, settings, execution)
        run.train(draft)
        result = run.write_checkpoint(draft)
        draft.write(DISTILLATION_FILE, result.to_json())
        with_results = replace(card, results=results_of_distillation(result))
        mix, counted = mix_of_export(inputs.exported.facts), counted_of_export(inputs.exported.facts)
        loaded_by = auto_class(inputs.dense.config)
        dense = sentences_on_dense_linears(inputs.dense.dense_rows, inputs.dense.num_layers)
        content = model_card(
            with_results, "dense", recovery, result.sentence, mix, loaded_by, counted, dense=dense
        )
        draft.write(CARD_FILE, content.encode())
        draft.facts |= {"steps": result.steps, "best step": result.best_step}
        draft.facts |= {f"{row.model} perplexity": row.test for row in result.rows}

    artifact = store.get_or_build(distill_stage(inputs, settings, card, recovery), build)
    require_whole(store, artifact)  # a reused artifact is not read by any later stage
    return artifact


class _Distillation:
    """A distillation in progress."""

    def __init__(
        self, store: ArtifactStore, inputs: DistillInputs, settings: DistillSettings, execution: Execution
    ) -> None:
        self.store, self.inputs, self.settings, self.execution = store, inputs, settings, execution
        self.input_ids = read_input_ids(store, inputs.calibration)
        self.counted = read_counted(store, inputs.calibration, inputs.calibrate_on)
        settings.require_windows(len(self.input_ids))
        self.pruned = open_exported(store, inputs.exported)
        rows = json.loads(store.read(inputs.exported, SPARSITY_FILE))["linears"]
        self.zeros = sum(row["zeros"] for row in rows)
        of_layers = [self.pruned.layer_tensors(index) for index in range(self.pruned.num_layers)]
        weights = [(row["layer"], f"{row['linear']}.weight") for row in rows]
        self.trained = {}  # name of the weight in resume points, by name in the model
        for layer, name in weights:
            model_name = f"{self.pruned.layer_prefix}.{layer}.{name}"
            stored = of_layers[layer].get(name)  # None: the weight of an expert, a part of a tensor
            self.trained[model_name] = model_name if stored is None else stored.name
        self.recompute = self._require_memory({(row["layer"], row["linear"]) for row in rows})

    def _require_memory(self, pruned: set[tuple[int, str]]) -> bool:
        """Refuse a model that is too large; return whether activations have to be computed again."""
        index, config = self.pruned.index, self.pruned.config.get_text_config()
        by_layer: list[tuple[Linear, ...]] = linears_by_layer(index, self.input_ids.shape[1])
        linears = [
            linear for layer, each in enumerate(by_layer) for linear in each if (layer, linear.name) in pruned
        ]
        on_cpu = self.execution.torch_device.type == "cpu"  # where the states are kept
        states = self.input_ids.numel() * config.hidden_size * DTYPES[self.inputs.dtype].itemsize
        memory = distillation_memory(
            linears,
            index.num_layers,
            index.parameters,
            DTYPES[index.dtype],
            DTYPES[self.inputs.training_dtype],
            self.input_ids.shape[1],
            config.hidden_size,
            config.vocab_size,
            min(states, self.execution.hidden_states_bytes) if on_cpu else 0,
        )
        return memory.require(self.execution.torch_device)

    def train(self, draft: Draft) -> None:
        """Train to the end, from a resume point if an earlier attempt left one."""
        last = len(self.input_ids) - self.settings.held_out
        states = self._teach()
        windows, held_out = (
            TaughtWindows(
                self.input_ids[part], states[part], None if self.counted is None else self.counted[part]
            )
            for part in (slice(last), slice(last, None))
        )
        self.student = student = Student(
            self.pruned,
            self.trained,
            self.inputs.training_dtype,
            self.settings,
            self.execution,
            self.recompute,
        )
        if draft.resumed is not None:
            student.load_state(self.store, draft.resumed.state, draft.resumed.step)
        else:
            student.evaluate(held_out)
        steps, title = self.settings.steps, "distill"
        with (
            boundaries(draft, self.execution, student.write_state) as reached,
            showing(title, steps, student.step, draft.resumed, "step") as show,
        ):
            while not student.is_done:
                loss = student.train(windows)
                if student.step % self.settings.evaluate_every == 0 or student.step == steps:
                    student.evaluate(held_out)
                show(student.step, _note(loss, student.evaluations))
                reached(student.step)
        if draft.resumed is None or student.step > draft.resumed.step:
            draft.save_resume_point(student.step, student.write_state)  # the evaluation below takes time

    def _teach(self) -> Tensor:
        """Return the dense model's output of the last decoder layer for all windows, and score the held-out ones."""
        model = streamed_model(self.inputs.dense, self.inputs.dtype, self.execution)
        states = self._run(
            model, self.inputs.dense.layers(device=model.device), self.input_ids, "distill: dense model"
        )
        held_out = slice(len(self.input_ids) - self.settings.held_out, None)
        counted = None if self.counted is None else self.counted[held_out]
        losses = window_losses(model, states[held_out], self.input_ids[held_out], counted)
        self.dense_held_out = perplexity(losses)
        return model.hidden_states(states)

    def _run(
        self, model: StreamedModel, layers: Iterator[Mapping[str, Tensor]], input_ids: Tensor, title: str
    ) -> Tensor:
        """Return the states after the last layer, shape ``(windows, seqlen, layout.size)``."""
        room = self.execution.hidden_states_room()
        hidden_states = room.empty((*input_ids.shape, model.layout.size), model.dtype)
        embed_windows(model, input_ids, hidden_states, 0)
        with showing(title, model.num_layers) as show:
            for index, weights in enumerate(layers):
                with model.loaded(index, weights) as layer:
                    for states in batches(hidden_states):
                        states.copy_(model.run_layer(index, layer, states))
                show(index + 1)
        return hidden_states

    def write_checkpoint(self, draft: Draft) -> Distillation:
        """Write the best weights, and score them on the test windows."""
        tested, student = read_test(self.store, self.inputs.tested), self.student
        test_ids = read_input_ids(self.store, self.inputs.test)
        model = streamed_model(self.pruned, self.inputs.dtype, self.execution)
        states = self._run(
            model, self._distilled_layers(), test_ids, "distill: distilled model on the test windows"
        )
        distilled = perplexity(window_losses(model, states, test_ids))
        zeros, exported = 0, self.inputs.exported
        groups = self.pruned.source_tensors().items()
        layer_of = {tensor.name: layer for layer, group in groups if layer is not None for tensor in group}
        for shard in sorted(name for name in exported.files if name.endswith(".safetensors")):
            tensors = read_tensors(self.store, exported, shard)
            # The export writes every layer into a shard of its own.
            for layer in sorted({layer_of[name] for name in tensors.keys() & layer_of.keys()}):
                weights = self._with_best(layer, self.pruned.read(self.pruned.layer_tensors(layer)))
                zeros += self._trained_zeros(layer, weights)
                stored = self.pruned.layer_by_stored_name(layer, weights)
                tensors |= {name: stored[name] for name in tensors.keys() & stored.keys()}
            write_tensors(draft, shard, tensors, metadata={"format": "pt"})
        assert zeros == self.zeros, "training changes no zero"
        for name in (*copied_files(exported.files), SPARSITY_FILE, WEIGHTS_INDEX):
            draft.write(name, self.store.read(exported, name))
        first, best = student.evaluations[0], min(student.evaluations, key=lambda each: each.kl)
        return self._result(
            student.evaluations,
            len(test_ids),
            (
                DistilledRow("dense", tested.dense, self.dense_held_out, 0),
                DistilledRow("pruned", tested.best, first.perplexity, self.zeros),
                DistilledRow("distilled", distilled, best.perplexity, zeros),
            ),
        )

    def _result(
        self, evaluations: list[HeldOutLoss], test_windows: int, rows: tuple[DistilledRow, ...]
    ) -> Distillation:
        settings, seqlen = self.settings, self.input_ids.shape[1]
        return Distillation(
            self.inputs.text_name,
            len(self.input_ids) - self.settings.held_out,
            self.settings.held_out,
            test_windows,
            seqlen,
            self.student.step,
            self.student.best_step,
            settings.batch,
            self._trained_tokens(),
            settings.learning_rate,
            tuple(evaluations),
            rows,
        )

    def _trained_tokens(self) -> int:
        """Return the number of tokens that counted in all steps."""
        settings, windows = self.settings, len(self.input_ids) - self.settings.held_out
        used = self.student.step * settings.batch
        if self.counted is None:
            return used * self.input_ids.shape[1]
        return int(self.counted[window_order(windows, used, settings.seed)].sum()) if used else 0

    def _with_best(self, index: int, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a layer of the pruned checkpoint, the trained ones replaced by their best values."""
        distilled = dict(layer)
        for relative, before in layer.items():
            name = self.trained.get(f"{self.pruned.layer_prefix}.{index}.{relative}")
            if name is not None:
                distilled[relative] = in_stored_dtype(self.student.best[name], before)
        return distilled

    def _trained_zeros(self, index: int, layer: Mapping[str, Tensor]) -> int:
        names = (name for name in layer if f"{self.pruned.layer_prefix}.{index}.{name}" in self.trained)
        return sum(int((layer[name] == 0).sum()) for name in names)

    def _distilled_layers(self) -> Iterator[Mapping[str, Tensor]]:
        for index, layer in enumerate(self.pruned.layers()):
            yield self._with_best(index, layer)


def _note(loss: float, evaluations: list[HeldOutLoss]) -> str:
    last = evaluations[-1]
    return f"loss {loss:.3f}; held out after step {last.step}: loss {last.kl:.3f}, perplexity {last.perplexity:.1f}"
