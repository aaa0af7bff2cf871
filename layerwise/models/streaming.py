"""Streaming: run a model one decoder layer at a time, with only that layer's weights in memory.

There is no code per model family. The model's own forward pass runs with recording layers in place of its decoder
layers; this gives the input of the first layer and the exact arguments of every layer. At the end, the forward pass
runs with one layer that injects the last hidden states, so the final norm and the head are the model's own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from layerwise.models.prunable_linears import prunable_linears
from layerwise.models.skeleton import (
    UnsupportedModel,
    build_skeleton,
    expected_tensors,
    fill_unused_parts,
    layer_prefix,
    with_plain_forward,
)

# Positions whose logits are converted to float32 losses at a time: 256 x 128k vocabulary x 4 bytes = 134 MB.
LOSS_POSITIONS = 256
# Largest tuple that a layer returns: hidden states, attention weights, cache, router logits.
MOST_OUTPUTS = 4


# Why a model is refused whose layers write to their arguments.
SHARED_STATE = "lets a layer change the arguments of later layers, such as shared keys and values"

LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


class OtherShape(Exception):
    """A layer received hidden states of another shape, because the model indexes the output of a layer."""


class ExtraOutput:
    """Placeholder for an output of a layer other than the hidden states."""


class ExtraOutputUsed(Exception):
    """A layer received an output of another layer other than the hidden states."""


class LastLayerReached(Exception):
    """All layers were called, so norm and head need not be computed."""


class Recorder(nn.Module):
    """Replacement for a decoder layer that records its arguments and returns the hidden states unchanged.

    Args:
        layer: the replaced layer.
        shape: expected shape of the hidden states without the last dimension.
        outputs: number of entries of the returned tuple; 0 returns the hidden states alone.
        last: whether to end the forward pass here.
    """

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], outputs: int, last: bool) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is not registered as a submodule
        self.shape, self.outputs, self.last = shape, outputs, last
        self.hidden_states: Tensor | None = None
        self.arguments: LayerArguments | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        if tuple(hidden_states.shape[:-1]) != self.shape:
            raise OtherShape
        if any(isinstance(argument, ExtraOutput) for argument in (*args, *kwargs.values())):
            raise ExtraOutputUsed
        self.hidden_states, self.arguments = hidden_states, (args, kwargs)
        if self.last:
            raise LastLayerReached
        return as_output(hidden_states, self.outputs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer[0], name)  # e.g. attention_type, which selects the mask in some models


class Injector(nn.Module):
    """Replacement for all decoder layers that returns given hidden states.

    Args:
        layer: one of the replaced layers.
    """

    def __init__(self, hidden_states: Tensor, outputs: int, layer: nn.Module) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is not registered as a submodule
        self.hidden_states, self.outputs = hidden_states, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        return as_output(self.hidden_states, self.outputs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer[0], name)  # e.g. block_type, which selects the mask in Nemotron-H


def as_output(hidden_states: Tensor, outputs: int) -> Tensor | tuple[Any, ...]:
    """Return the hidden states in a tuple of ``outputs`` entries, or alone if ``outputs`` is 0."""
    return (hidden_states, *(ExtraOutput() for _ in range(outputs - 1))) if outputs else hidden_states


def same_arguments(known: Any, other: Any) -> bool:
    """Return whether two recorded arguments are equal; values other than tensors, dicts and sequences count as equal."""
    if isinstance(known, Tensor):
        return isinstance(other, Tensor) and torch.equal(known, other)
    if isinstance(known, dict):
        return all(same_arguments(value, other.get(name)) for name, value in known.items())
    if isinstance(known, list | tuple):
        return all(map(same_arguments, known, other))
    return True


def state_of(argument: Any) -> Any:
    """Return a value that changes when a tensor, mapping or list in ``argument`` is written to."""
    if isinstance(argument, Tensor):
        return id(argument), argument._version
    if isinstance(argument, Mapping):
        return {name: state_of(value) for name, value in argument.items()}
    if isinstance(argument, list | tuple):
        return [state_of(value) for value in argument]
    return id(argument)


class StreamedModel:
    """A causal language model with all weights loaded except those of its decoder layers, which are loaded one by one.

    With a large vocabulary, the input embedding and the head are larger than a decoder layer. Unless they are tied,
    the head is loaded when the first loss is computed, and the embedding can be released after all windows are
    embedded.

    Args:
        config: the model's configuration.
        outer: weights outside the decoder layers, by state-dict name; tied ones may be missing. An entry is read when
            it is needed, so the mapping may read it from a file.
        dtype: dtype of the computation; weights are converted to it.
        device: device of the computation.
    """

    def __init__(
        self, config: PretrainedConfig, outer: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        self.model = build_skeleton(with_plain_forward(config))
        self.prefix = layer_prefix(self.model)
        self.layers = cast(nn.ModuleList, self.model.get_submodule(self.prefix))
        self.linears = tuple(prunable_linears(self.model))
        self.num_layers = len(self.layers)
        fill_unused_parts(self.model, dtype, device)
        self._outer = outer
        self._vocabulary, self._embedding_size = cast(Tensor, self.model.get_input_embeddings().weight).shape
        self._embedding = self._untied(self.model.get_input_embeddings())
        self._head = self._untied(self.model.get_output_embeddings())
        self._load([name for name in outer if name != self._head])
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        self._check_outer_is_complete()
        self._arguments: dict[tuple[int, ...], list[LayerArguments]] = {}
        self._outputs = 0  # number of entries of the tuple that a layer returns; 0: hidden states alone

    def _untied(self, module: nn.Module | None) -> str | None:
        """Return the state-dict name of the weight of ``module``, or None if the weight is tied."""
        weight = getattr(module, "weight", None)
        tied = self.model.all_tied_weights_keys
        names = [name for name, parameter in self.model.named_parameters() if parameter is weight]
        return names[0] if names and names[0] not in {*tied, *tied.values()} else None

    def _load(self, names: Iterable[str]) -> None:
        weights = {name: self._outer[name].to(self.device, self.dtype) for name in names}
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()

    def _is_released(self, name: str | None) -> bool:
        return name is not None and self.model.get_parameter(name).is_meta

    def _require(self, name: str | None) -> None:
        if name is not None and self._is_released(name):
            self._load([name])

    def _check_outer_is_complete(self) -> None:
        inside = f"{self.prefix}."
        needed = [name for name in expected_tensors(self.model) if not name.startswith(inside)]
        missing = [name for name in needed if name not in self._outer]
        if missing:
            raise ValueError(
                f"{self.model.config.model_type}: no weights were given for {', '.join(missing)}. "
                "Pass every tensor outside the decoder layers."
            )

    def release_embedding(self) -> None:
        """Free the input embedding, unless it is tied to the head. Embedding windows later loads it again."""
        if self._embedding is not None:
            _to_meta(self.model.get_input_embeddings())

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the input of the first decoder layer for ``input_ids``.

        Args:
            input_ids: shape ``(windows, seqlen)``.

        Returns:
            Hidden states, shape ``(windows, seqlen, hidden_size)``.

        Raises:
            UnsupportedModel: the model does not call its layers as streaming requires.
        """
        self._require(self._embedding)
        recorders = self._record(input_ids)
        first = recorders[0].hidden_states
        arguments = [recorder.arguments for recorder in recorders if recorder.arguments is not None]
        if first is None or len(arguments) < self.num_layers:
            raise self._unsupported(
                f"calls {len(arguments)} of its {self.num_layers} layers in {self.prefix} for text alone"
            )
        received = [recorder.hidden_states for recorder in recorders]
        if not all(
            states is first or (states is not None and torch.equal(states, first)) for states in received
        ):
            raise self._unsupported("changes the hidden states between its layers")
        if tuple(input_ids.shape) not in self._arguments:
            others = self._record((input_ids + 1) % self._vocabulary)
            if not same_arguments(arguments, [recorder.arguments for recorder in others]):
                raise self._unsupported("calls its layers with arguments that depend on the tokens")
            self._arguments[tuple(input_ids.shape)] = arguments
        return first

    def _unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.model.config.model_type} {reason}; it cannot be streamed layer by layer. Use another model."
        )

    def _record(self, input_ids: Tensor) -> list[Recorder]:
        shape = tuple(input_ids.shape)
        # Older models return tuples and use the first entry (Falcon, BLOOM, GPT-J, MPT) or all entries (Bamba).
        for outputs in (self._outputs, *range(1, MOST_OUTPUTS + 1)):
            last = self.layers[-1]
            recorders = [Recorder(layer, shape, outputs, layer is last) for layer in self.layers]
            try:
                with self._layers_replaced(recorders), suppress(LastLayerReached):
                    self.model(input_ids=input_ids.to(self.device), use_cache=False)
            except OtherShape:
                reason = "changes the shape of the windows between its layers"
            except ExtraOutputUsed:
                raise self._unsupported("passes more than hidden states from layer to layer") from None
            except (ValueError, IndexError) as error:  # the model unpacks another number of values
                if recorders[0].arguments is None:
                    raise self._unsupported(f"cannot be run on text alone ({error})") from error
                reason = f"uses more outputs of its layers than hidden states ({error})"
            else:
                self._outputs = outputs
                return recorders
        raise self._unsupported(reason)

    @contextmanager
    def loaded(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Load ``weights`` into decoder layer ``index`` for the duration of the block.

        Weights that already have the right dtype and device are not copied, so changing them changes the layer.

        Args:
            index: index of the layer.
            weights: weights of the layer, by name relative to the layer.

        Raises:
            ValueError: a weight of the layer is missing.
        """
        layer = self.layers[index]
        on_device = {name: tensor.to(self.device, self.dtype) for name, tensor in weights.items()}
        layer.load_state_dict(on_device, strict=False, assign=True)
        try:
            if missing := sorted(set(layer.state_dict()) - set(weights)):
                raise ValueError(
                    f"layer {index} has no weights for {', '.join(missing)}; it has {', '.join(sorted(weights)) or 'none'}. "
                    "Pass every parameter and stored buffer of the decoder layer."
                )
            yield layer
        finally:
            for module in layer.modules():
                _to_meta(module)

    @torch.no_grad()
    def run_layer(self, index: int, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """Return the output of ``layer`` at position ``index`` for ``hidden_states``.

        Input and output have the shape ``(windows, seqlen, hidden_size)``.
        """
        return self.run_layer_with_gradients(index, layer, hidden_states)

    def run_layer_with_gradients(
        self, index: int, layer: Callable[..., Any], hidden_states: Tensor
    ) -> Tensor:
        """Do the same as ``run_layer``, but let the output be differentiated where gradients are enabled.

        Args:
            layer: the layer, or a function that calls it with other weights.
        """
        args, kwargs = self._arguments_for(tuple(hidden_states.shape[:2]))[index]
        given = (hidden_states.to(self.device), args, kwargs)
        before = state_of(given)
        output = layer(given[0], *args, **kwargs)
        if state_of(given) != before:
            raise self._unsupported(SHARED_STATE)
        if isinstance(output, Tensor):
            return output
        self._outputs = self._outputs or len(output)  # recording cannot detect it in a model with one layer
        return output[0]

    def _arguments_for(self, shape: tuple[int, ...]) -> list[LayerArguments]:
        if shape not in self._arguments:
            released = self._is_released(self._embedding)
            # Masks and positions depend on the shape only, because there is no padding; the tokens do not matter.
            self.embed(torch.zeros(shape, dtype=torch.long))
            if released:
                self.release_embedding()
        return self._arguments[shape]

    @torch.no_grad()
    def require_independent_layers(self, shape: tuple[int, ...]) -> None:
        """Raise if a layer writes to a mapping or list that later layers receive. Needs no weights.

        Args:
            shape: of windows that were embedded.

        Raises:
            UnsupportedModel: see above.
        """
        for index, layer in enumerate(self.layers):
            args, kwargs = self._arguments[shape][index]
            if not any(isinstance(each, MutableMapping | list) for each in (*args, *kwargs.values())):
                continue
            on_meta = deepcopy(layer).to("meta")
            given = _on_meta((args, kwargs))
            before = state_of(given)
            with suppress(
                RuntimeError, TypeError, ValueError, AttributeError, LookupError
            ):  # it needs values
                on_meta(torch.empty(*shape, self._hidden_size(), device="meta"), *given[0], **given[1])
            if state_of(given) != before:
                raise self._unsupported(SHARED_STATE)

    def _hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the model's norm and head to the output of the last layer.

        Returns:
            Logits, shape ``(windows, seqlen, vocab_size)``.
        """
        self._require(self._head)
        if not self._arguments:
            self._arguments_for(tuple(hidden_states.shape[:2]))  # sets self._outputs
        states = hidden_states.to(self.device)
        with self._layers_replaced([Injector(states, self._outputs, self.layers[0])]):
            # The injector ignores these values; passing them avoids loading the embedding.
            inputs_embeds = states.new_zeros(*states.shape[:2], self._embedding_size)
            return self.model(inputs_embeds=inputs_embeds, use_cache=False).logits

    def loss(self, hidden_states: Tensor, input_ids: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy, in nats, of the ``seqlen - 1`` next tokens of one window, computed in float32.

        The scalar stays on the device, because reading it would wait for the computation.

        Args:
            hidden_states: output of the last layer, shape ``(1, seqlen, hidden_size)``.
            input_ids: tokens of the window, shape ``(1, seqlen)``.
            counted: see ``next_token_loss``.
        """
        return next_token_loss(self.logits(hidden_states), input_ids, counted)

    @contextmanager
    def _layers_replaced(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        """Replace the decoder layers by other modules within the block."""
        owner, _, leaf = self.prefix.rpartition(".")
        parent = self.model.get_submodule(owner)
        setattr(parent, leaf, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(parent, leaf, self.layers)


def next_token_loss(logits: Tensor, input_ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy, in nats, of the ``seqlen - 1`` next tokens of one window, computed in float32.

    Args:
        logits: shape ``(1, seqlen, vocab_size)``.
        input_ids: tokens of the window, shape ``(1, seqlen)``.
        counted: mask of the tokens whose prediction counts, same shape, with one after the first token; None for all.
    """
    predictions = logits[0, :-1]
    targets = input_ids[0, 1:].to(logits.device)
    count: int | Tensor = len(targets)
    masks: Iterable[Tensor | None] = repeat(None)
    if counted is not None:
        of_targets = counted[0, 1:].to(logits.device)
        count, masks = of_targets.sum(), of_targets.split(LOSS_POSITIONS)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for some_logits, some_targets, mask in zip(
        predictions.split(LOSS_POSITIONS), targets.split(LOSS_POSITIONS), masks, strict=False
    ):
        if mask is not None:
            some_logits, some_targets = some_logits[mask], some_targets[mask]
        total += nn.functional.cross_entropy(some_logits.float(), some_targets, reduction="sum")
    return total / count


def _on_meta(value: Any) -> Any:
    """Return a copy of arguments whose tensors have shapes but no values."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, MutableMapping):
        same_kind: Any = type(value)
        return same_kind({name: _on_meta(each) for name, each in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_on_meta(each) for each in value)
    return value


def _to_meta(module: nn.Module) -> None:
    """Free the module's own parameters. Buffers are kept, because some are computed only when the module is built."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
