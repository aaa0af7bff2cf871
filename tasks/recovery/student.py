"""The student of a distillation: the pruned model in memory, its training so far, and its state in resume points."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from layerwise.models.split_model import SplitModel
from layerwise.recovery.distillation import (
    MaskedAdamW,
    kl_and_gradient,
    rate_factor,
    window_losses,
    window_order,
)
from layerwise.scoring.perplexity import finite_loss, mean_loss, perplexity
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors, write_tensors
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import DTYPES
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.results.distillation import HeldOutLoss
from layerwise.tasks.running.execution import Execution

# Files of a resume point.
TRAINING_FILE, BEST_FILE, EVALUATIONS_FILE = "training.safetensors", "best.safetensors", "evaluations.json"


@dataclass(frozen=True)
class DistillSettings:
    """Settings of a distillation.

    Attributes:
        steps: number of changes of the weights.
        learning_rate: largest step size of AdamW, relative to the root mean square of each linear's kept weights.
        batch: windows per step.
        held_out: number of windows that are not trained on.
        evaluate_every: steps between evaluations on the held-out windows.
        patience: evaluations without an improvement before the training stops.
        seed: seed of the order of the windows.
    """

    steps: int
    learning_rate: float
    batch: int
    held_out: int
    evaluate_every: int
    patience: int
    seed: int

    def require_windows(self, windows: int) -> None:
        """Check that windows to train on are left.

        Raises:
            ValueError: all windows would be held out.
        """
        if self.held_out >= windows:
            raise ValueError(
                f"there are {windows} calibration windows, and {self.held_out} of them are to be held out, so there is "
                "nothing to train on. Draw more windows (--windows), or hold out fewer (--held-out)."
            )


@dataclass(frozen=True)
class TaughtWindows:
    """Windows of tokens, and the dense model's output of its last decoder layer for them.

    Attributes:
        input_ids: shape ``(windows, seqlen)``.
        teacher_states: shape ``(windows, seqlen, hidden_size)``.
        counted: mask of the tokens whose prediction counts, shape ``(windows, seqlen)``; None for all.
    """

    input_ids: Tensor
    teacher_states: Tensor
    counted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def window(self, number: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return one window with its teacher states and its mask on ``device``."""
        one = slice(number, number + 1)
        counted = None if self.counted is None else self.counted[one].to(device)
        return self.input_ids[one].to(device), self.teacher_states[one].to(device), counted


class Student:
    """The pruned model, of which only the kept weights of the pruned linears are trained.

    There is one set of weights in float32; the computation is in ``dtype`` by autocast. transformers' Trainer is not
    used: it keeps the optimizer's state as pickles in a local folder, where a resume point cannot be in the store.

    Args:
        checkpoint: pruned checkpoint.
        trained: names of the pruned linears' weights in resume points, by their names in the model.
        dtype: dtype of the computation.
        recompute: see ``SplitModel``.

    Attributes:
        step: number of steps so far.
        evaluations: evaluations on the held-out windows so far.
        best: weights of the best evaluation, in the dtype of the checkpoint, by name in resume points.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        trained: Mapping[str, str],
        dtype: str,
        settings: DistillSettings,
        execution: Execution,
        recompute: bool,
    ) -> None:
        self._settings, self._device = settings, execution.torch_device
        model = whole_model(checkpoint, dtype, execution)
        self._computes_in, self._stored = DTYPES[dtype], dict[str, torch.dtype]()
        self._split = SplitModel(model, recompute)
        weights = {}
        for index, layer in enumerate(checkpoint.layers()):
            for relative, weight in layer.items():
                model_name = f"{checkpoint.layer_prefix}.{index}.{relative}"
                if (name := trained.get(model_name)) is not None:
                    owner, _, leaf = model_name.rpartition(".")
                    weights[name] = nn.Parameter(weight.to(self._device, torch.float32, copy=True))
                    self._stored[name] = weight.dtype
                    setattr(model.get_submodule(owner), leaf, weights[name])
        self._optimizer = MaskedAdamW(weights, settings.learning_rate)
        self.step = 0
        self.evaluations: list[HeldOutLoss] = []
        self.best: dict[str, Tensor] = {}

    @property
    def best_step(self) -> int:
        """Step of the evaluation with the lowest divergence."""
        return min(self.evaluations, key=lambda each: each.kl).step

    @property
    def is_done(self) -> bool:
        """Whether all steps are done, or the last evaluations brought no improvement."""
        since_best = sum(each.step > self.best_step for each in self.evaluations)
        return self.step >= self._settings.steps or since_best >= self._settings.patience

    def train(self, windows: TaughtWindows) -> float:
        """Do one step, and return the mean divergence of its windows before it, in nats per token."""
        settings, total = self._settings, 0.0
        first = self.step * settings.batch
        order = window_order(len(windows), first + settings.batch, settings.seed)
        with _repeatable(self._device):
            for number in order[first:]:
                input_ids, teacher_states, counted = windows.window(number, self._device)
                with self._autocast():
                    hidden_states = self._split.hidden_states(input_ids)
                    loss, gradient = kl_and_gradient(
                        self._split.logits, hidden_states, teacher_states, counted
                    )
                hidden_states.backward(gradient / settings.batch)
                total += loss / settings.batch
        self._optimizer.step(rate_factor(self.step, settings.steps))
        self.step += 1
        return total

    @torch.no_grad()
    def evaluate(self, held_out: TaughtWindows) -> HeldOutLoss:
        """Score the held-out windows, and keep the weights if they are the best so far."""
        losses = []
        with self._autocast():
            for number in range(len(held_out)):
                input_ids, teacher_states, counted = held_out.window(number, self._device)
                hidden_states = self._split.hidden_states(input_ids)
                losses.append(
                    window_losses(self._split.logits, hidden_states, teacher_states, input_ids, counted)
                )
        found = HeldOutLoss(
            self.step,
            mean_loss([finite_loss(each.kl) for each in losses]),
            perplexity([finite_loss(each.cross_entropy) for each in losses]),
        )
        self.evaluations.append(found)
        if self.best_step == self.step:
            self.best = {
                name: weight.detach().to("cpu", self._stored[name], copy=True)
                for name, weight in self._optimizer.weights.items()
            }
        return found

    def write_state(self, state: Draft) -> None:
        """Write a resume point."""
        write_tensors(state, TRAINING_FILE, self._optimizer.state())
        write_tensors(state, BEST_FILE, self.best)
        rows = [asdict(each) for each in self.evaluations]
        state.write(EVALUATIONS_FILE, json.dumps(rows).encode())

    def load_state(self, store: ArtifactStore, state: Artifact, step: int) -> None:
        """Continue from the resume point that was written after ``step`` steps."""
        self.step = step
        self._optimizer.load_state(read_tensors(store, state, TRAINING_FILE), step)
        self.best = read_tensors(store, state, BEST_FILE)
        self.evaluations = [HeldOutLoss(**row) for row in json.loads(store.read(state, EVALUATIONS_FILE))]

    def _autocast(self) -> torch.autocast:
        narrow = self._computes_in != torch.float32
        return torch.autocast(self._device.type, self._computes_in if narrow else None, enabled=narrow)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Let CUDA add in a fixed order in the backward pass of attention, where it does not by default."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
