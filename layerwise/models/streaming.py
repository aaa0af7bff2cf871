"""Streaming: run a model one decoder layer at a time, with only that layer's weights in memory.

There is no code per model family. The model's own forward pass runs with recording layers in place of its decoder
layers; this gives the input of the first layer and the exact arguments of every layer. At the end, the forward pass
runs with one layer that injects the last hidden states, so the final norm and the head are the model's own.

Arguments that depend on the tokens or on the outputs of earlier layers are computed again for every batch, in the same
way, from the state that the batch carries from layer to layer (``layerwise.models.layer_state``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from itertools import repeat, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from layerwise.models.layer_state import Place, StateLayout, StoredTensor, stored_tensors, token_tensor
from layerwise.models.prunable_linears import prunable_linears
from layerwise.models.skeleton import (
    UnsupportedModel,
    build_skeleton,
    expected_tensors,
    fill_unused_parts,
    layer_prefix,
    positions_of,
    with_plain_forward,
)

# Positions whose logits are converted to float32 losses at a time: 256 x 128k vocabulary x 4 bytes = 134 MB.
LOSS_POSITIONS = 256
# Largest tuple that a layer returns: hidden states, attention weights, cache, router logits.
MOST_OUTPUTS = 4


# Windows and their lengths in the two batches of made-up tokens that show what a model carries from layer to layer. Tensors
# with values for every token are found by their sizes. The tokens of a batch differ.
PROBED_WINDOWS, PROBED_SEQLENS = (3, 2), (7, 11)

# Reasons why a model is refused: it computes between its layers, or these write to their arguments.
CHANGED_BETWEEN = "changes the hidden states between its layers"
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
        before: the recorders of the layers before it.
        outputs: number of entries of the returned tuple; 0 returns the hidden states alone.
        last: whether to end the forward pass here.
        returned: hidden states to return instead of those that it received.
    """

    def __init__(
        self,
        layer: nn.Module,
        before: "Sequence[Recorder]",
        outputs: int,
        last: bool,
        returned: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is not registered as a submodule
        self.first = [*before[:1]]
        self.outputs, self.last, self.returned = outputs, last, returned
        self.hidden_states: Tensor | None = None
        self.arguments: LayerArguments | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        expected = self.first[0].hidden_states if self.first else None
        if expected is not None and hidden_states.shape != expected.shape:
            raise OtherShape
        if any(isinstance(argument, ExtraOutput) for argument in (*args, *kwargs.values())):
            raise ExtraOutputUsed
        self.hidden_states, self.arguments = hidden_states, (args, kwargs)
        if self.last:
            raise LastLayerReached
        return as_output(hidden_states if self.returned is None else self.returned, self.outputs)

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


def _received(recorders: Sequence[Recorder]) -> list[Tensor]:
    return [recorder.hidden_states for recorder in recorders if recorder.hidden_states is not None]


def _made_up_outputs(hidden_states: Tensor, layers: int) -> list[Tensor]:
    """Return hidden states for the outputs of layers, all different."""
    # Computed on the device, so that nothing is copied to it.
    steps = torch.arange(hidden_states.numel(), dtype=torch.float32, device=hidden_states.device)
    return [
        torch.sin((layer + 1) * steps).to(hidden_states.dtype).view_as(hidden_states)
        for layer in range(layers)
    ]


def as_output(hidden_states: Tensor, outputs: int) -> Tensor | tuple[Any, ...]:
    """Return the hidden states in a tuple of ``outputs`` entries, or alone if ``outputs`` is 0."""
    return (hidden_states, *(ExtraOutput() for _ in range(outputs - 1))) if outputs else hidden_states


def same_arguments(known: Any, other: Any) -> bool:
    """Return whether two recorded arguments are equal; values other than tensors, dicts and sequences count as equal."""
    if isinstance(known, Tensor):
        return isinstance(other, Tensor) and torch.equal(known, other)
    if isinstance(known, Mapping):
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
        self.model.tie_weights()  # only now: what is loaded later is not tied, and a layer may be loaded then
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

    @cached_property
    def layout(self) -> StateLayout:
        """Layout of the state between the layers. It is found on made-up tokens when it is first needed.

        Raises:
            UnsupportedModel: the model does not call its layers as streaming requires.
        """
        with self._embedding_for_a_moment():
            return self._find_layout()

    def forget_other_shapes(self, shapes: Collection[tuple[int, ...]]) -> None:
        """Free the arguments of layers, such as masks, for all shapes of token ids but these; others are computed again."""
        self._arguments = {shape: each for shape, each in self._arguments.items() if shape in shapes}

    def release_embedding(self) -> None:
        """Free the input embedding, unless it is tied to the head. Embedding windows later loads it again.

        A model that computes arguments of its layers from the tokens keeps it.
        """
        if self._embedding is not None and not self.layout.replays:
            _to_meta(self.model.get_input_embeddings())

    @contextmanager
    def _embedding_for_a_moment(self) -> Iterator[None]:
        """Load the input embedding within the block, if it was released."""
        released = self._is_released(self._embedding)
        self._require(self._embedding)
        try:
            yield
        finally:
            if released:
                _to_meta(self.model.get_input_embeddings())

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the state before the first decoder layer for ``input_ids``.

        Args:
            input_ids: shape ``(windows, seqlen)``.

        Returns:
            State, shape ``(windows, seqlen, layout.size)``: for most models the input of the first layer, shape
            ``(windows, seqlen, hidden_size)``.

        Raises:
            UnsupportedModel: the model does not call its layers as streaming requires.
        """
        self._require(self._embedding)
        layout = self.layout
        if layout.replays:
            first = self._record(input_ids, last=0)[0].hidden_states
            assert first is not None, "the layout was found, so the layers are called"
            return layout.begin(first, input_ids)
        recorders = self._record(input_ids)
        first, arguments = self._calls(recorders)
        if not all(states is first or torch.equal(states, first) for states in _received(recorders)):
            raise self._unsupported(CHANGED_BETWEEN)
        if tuple(input_ids.shape) not in self._arguments:
            others = self._record((input_ids + 1) % self._vocabulary)
            if not same_arguments(arguments, [recorder.arguments for recorder in others]):
                raise self._unsupported(
                    "calls its layers with arguments that depend on the tokens in long windows only"
                )
            self._arguments[tuple(input_ids.shape)] = arguments
        return layout.begin(first, input_ids)

    def hidden_states(self, states: Tensor) -> Tensor:
        """Return the hidden states in a state, shape ``(windows, seqlen, width)``, as a view; of most models all of it."""
        return self.layout.hidden_rows(states)

    def _calls(self, recorders: Sequence[Recorder]) -> tuple[Tensor, list[LayerArguments]]:
        """Return the input of the first layer, and the arguments of all."""
        first = recorders[0].hidden_states
        arguments = [recorder.arguments for recorder in recorders if recorder.arguments is not None]
        if first is None or len(arguments) < self.num_layers:
            raise self._unsupported(
                f"calls {len(arguments)} of its {self.num_layers} layers in {self.prefix} for text alone"
            )
        return first, arguments

    @property
    def _probed_seqlens(self) -> tuple[int, int]:
        positions = positions_of(self.model.config)
        if positions is None or positions >= max(PROBED_SEQLENS):
            return PROBED_SEQLENS
        return positions - 1, positions

    @torch.no_grad()
    def _find_layout(self) -> StateLayout:
        tokens = [
            torch.arange(windows * seqlen).view(windows, seqlen) % self._vocabulary
            for windows, seqlen in zip(PROBED_WINDOWS, self._probed_seqlens, strict=True)
        ]
        first, arguments = self._calls(recorders := self._record(tokens[0]))
        if not all(torch.equal(states, first) for states in _received(recorders)):
            raise self._unsupported(CHANGED_BETWEEN)
        other = self._record(tokens[1], last=0)[0].hidden_states
        hidden = None if other is None else token_tensor(first, other, PROBED_WINDOWS, self._probed_seqlens)
        if hidden is None:
            raise self._unsupported("changes the shape of the windows between its layers")
        stored = self._stored_tensors(tokens)
        others = (tokens[0] + 1) % self._vocabulary
        outputs = _made_up_outputs(first, self.num_layers)
        _, changed = self._calls(recorders := self._record(others, outputs))
        if not all(map(torch.equal, _received(recorders)[1:], outputs)):
            raise self._unsupported(CHANGED_BETWEEN)
        layout = StateLayout(hidden, self.dtype, stored=stored)
        if same_arguments(arguments, changed):
            return layout
        _, of_tokens = self._calls(self._record(tokens[0], outputs))
        has_tokens = not same_arguments(of_tokens, changed)
        only_last = same_arguments(arguments, of_tokens) and self._uses_only_last(tokens[0], first, outputs)
        kept = () if only_last else self._kept_layers(tokens[0], outputs, of_tokens)
        return replace(layout, has_tokens=has_tokens, kept=kept)

    def _uses_only_last(self, input_ids: Tensor, other: Tensor, outputs: Sequence[Tensor]) -> bool:
        """Return whether the model uses the output of no other layer after the last one.

        Args:
            other: output of all layers but the last one, for comparison with ``outputs``.
        """
        changed = [*(other for _ in outputs[:-1]), outputs[-1]]
        with self._without_head():
            return torch.equal(self._logits_of(input_ids, outputs), self._logits_of(input_ids, changed))

    def _kept_layers(
        self, input_ids: Tensor, outputs: Sequence[Tensor], arguments: Sequence[LayerArguments]
    ) -> tuple[int, ...]:
        """Return the layers whose output the model uses in the arguments of later layers or after the last one.

        Args:
            outputs: of all layers.
            arguments: of all layers, with these outputs.
        """
        kept = []
        with self._without_head():
            result = self._logits_of(input_ids, outputs)
            for layer, output in enumerate(outputs[:-1]):
                changed = [*outputs[:layer], -output, *outputs[layer + 1 :]]
                _, others = self._calls(self._record(input_ids, changed))
                same_result = torch.equal(result, self._logits_of(input_ids, changed))
                if not (same_result and same_arguments(arguments, others)):
                    kept.append(layer)
        return tuple(kept)

    @contextmanager
    def _without_head(self) -> Iterator[None]:
        """Within the block, let the model return the input of its head in place of logits."""
        head = cast(nn.Module, self.model.get_output_embeddings())
        forward = head.forward
        head.forward = lambda hidden_states: hidden_states
        try:
            yield
        finally:
            head.forward = forward

    def _stored_tensors(self, tokens: Sequence[Tensor]) -> tuple[StoredTensor, ...]:
        """Return the tensors that layers store in mappings among their arguments, found without weights.

        Raises:
            UnsupportedModel: a layer changes its arguments in another way.
        """
        if not (found := self._stored_by_layers(tokens[0])):
            return ()
        others = self._stored_by_layers(tokens[1])
        stored = []
        for place, (layers, tensor) in found.items():
            _, other = others.get(place, (layers, tensor))
            layout = token_tensor(tensor, other, PROBED_WINDOWS, self._probed_seqlens)
            if layout is None:
                raise self._unsupported(SHARED_STATE)
            stored.append(StoredTensor(place, layers, layout))
        return tuple(stored)

    def _stored_by_layers(self, input_ids: Tensor) -> dict[Place, tuple[tuple[int, ...], Tensor]]:
        """Run all layers that receive a mapping or list on tensors without values.

        Returns:
            What they store, by argument, key and position: the layers that store it, and a tensor without values.
        """
        first, arguments = self._calls(self._record(input_ids))
        found: dict[Place, tuple[tuple[int, ...], Tensor]] = {}
        for index, ((args, kwargs), layer) in enumerate(zip(arguments, self.layers, strict=True)):
            if not any(isinstance(each, MutableMapping | list) for each in (*args, *kwargs.values())):
                continue
            on_meta = deepcopy(layer).to("meta")
            for parameter in on_meta.parameters():
                parameter.data = parameter.data.to(self.dtype)
            given_args, given_kwargs = _on_meta((args, kwargs))

            def tried(*args: Any, on_meta: nn.Module = on_meta, **kwargs: Any) -> None:
                with suppress(
                    RuntimeError, TypeError, ValueError, AttributeError, LookupError
                ):  # it needs values
                    on_meta(*args, **kwargs)

            states = torch.empty_like(first, device="meta", dtype=self.dtype)
            known = {place: tensor for place, (_, tensor) in found.items()}
            _, written = self._call(tried, states, given_args, given_kwargs, known)
            for place, tensor in written.items():
                layers, _ = found.get(place, ((), tensor))
                found[place] = (*layers, index), tensor
        return found

    def _unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.model.config.model_type} {reason}; it cannot be streamed layer by layer. Use another model."
        )

    def _record(
        self, input_ids: Tensor, returned: Sequence[Tensor] = (), last: int | None = None
    ) -> list[Recorder]:
        """Run the model with recorders in place of its layers, and return these.

        Args:
            returned: output of every layer; by default, each returns what it received.
            last: layer at which the forward pass ends; None for the last one.
        """
        end = self.layers[-1 if last is None else last]
        # Older models return tuples and use the first entry (Falcon, BLOOM, GPT-J, MPT) or all entries (Bamba).
        for outputs in (self._outputs, *range(1, MOST_OUTPUTS + 1)):
            recorders: list[Recorder] = []
            for layer, output in zip_longest(self.layers, returned):
                recorders.append(Recorder(layer, recorders, outputs, layer is end, output))
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
    def run_layer(self, index: int, layer: nn.Module, states: Tensor) -> Tensor:
        """Return the state after ``layer`` at position ``index``, given the ``states`` before it, shape as from ``embed``."""
        output, written = self._run(index, layer, states)
        return self.layout.following(states.to(self.device), index, output, written)

    def run_layer_with_gradients(self, index: int, layer: Callable[..., Any], states: Tensor) -> Tensor:
        """Return the hidden states that a layer returns, in a form that can be differentiated where gradients are enabled.

        Args:
            layer: the layer, or a function that calls it with other weights.
        """
        return self.layout.hidden.rows(self._run(index, layer, states)[0])

    def stores(self, index: int) -> bool:
        """Return whether a layer stores something for later layers, apart from its output."""
        return any(index in each.layers for each in self.layout.stored)

    def _run(
        self, index: int, layer: Callable[..., Any], states: Tensor
    ) -> tuple[Tensor, dict[StoredTensor, Tensor]]:
        """Return the output of a layer, and what it stored for later layers."""
        layout, states = self.layout, states.to(self.device)
        args, kwargs = self._arguments_for(index, states)
        places = {each.place: each for each in layout.stored}
        known = {
            place: layout.stored_tensor(states, each)
            for place, each in places.items()
            if each.layers[0] < index
        }
        output, written = self._call(layer, layout.hidden_states(states), args, kwargs, known)
        for place, tensor in written.items():
            if place not in places or not places[place].tensor.fits(tensor, states.shape):
                raise self._unsupported(SHARED_STATE)
        if not isinstance(output, Tensor):
            self._outputs = self._outputs or len(
                output
            )  # recording cannot detect it in a model with one layer
            output = output[0]
        return output, {places[place]: tensor for place, tensor in written.items()}

    def _call(
        self,
        layer: Callable[..., Any],
        hidden_states: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stored: Mapping[Place, Tensor],
    ) -> tuple[Any, dict[Place, Tensor]]:
        """Call a layer, and take what it stores out of its arguments.

        Args:
            stored: tensors that earlier layers have stored.

        Raises:
            UnsupportedModel: the layer changes its arguments in another way.
        """
        given = (hidden_states, args, kwargs)
        before = state_of(given)
        named: dict[int | str, Any] = dict(enumerate(args)) | kwargs
        own = dict(stored_tensors(named))
        for (argument, key, position), tensor in stored.items():
            if isinstance(mapping := named.get(argument), MutableMapping):
                mapping[key] = tensor if position is None else (*mapping.get(key, ()), tensor)
        versions = {id(tensor): tensor._version for tensor in stored.values()}
        output = layer(*given[:1], *args, **kwargs)
        found = {place: tensor for place, tensor in stored_tensors(named) if own.get(place) is not tensor}
        for argument, key in {place[:2] for place in found}:
            del named[argument][key]
        if state_of(given) != before:
            raise self._unsupported(SHARED_STATE)
        return output, {
            place: tensor for place, tensor in found.items() if versions.get(id(tensor)) != tensor._version
        }

    def _arguments_for(self, index: int, states: Tensor) -> LayerArguments:
        """Return the arguments of a layer for a batch of windows.

        They depend on the shape only, because there is no padding, unless the layout says otherwise.
        """
        if self.layout.replays:
            return self._replayed(index, states)
        shape = tuple(states.shape[:2])
        if shape not in self._arguments:
            with self._embedding_for_a_moment():
                self.embed(torch.zeros(shape, dtype=torch.long))
        return self._arguments[shape][index]

    @torch.no_grad()
    def _replayed(self, index: int, states: Tensor) -> LayerArguments:
        """Compute the arguments of a layer for one batch, without the arguments of the layers behind it."""
        self._require(self._embedding)
        input_ids = self._tokens_of(states)
        arguments = self._record(input_ids, self._outputs_of(states), last=index)[index].arguments
        assert arguments is not None, "the layout was found, so the layers are called"
        return arguments

    def _tokens_of(self, states: Tensor) -> Tensor:
        """Return the tokens of a state, or any others if the arguments do not depend on them."""
        return (
            self.layout.tokens(states)
            if self.layout.has_tokens
            else states.new_zeros(states.shape[:2], dtype=torch.long)
        )

    def _outputs_of(self, states: Tensor) -> list[Tensor]:
        """Return the outputs of all layers that the arguments depend on, and in place of the others the hidden states."""
        layout, hidden_states = self.layout, self.layout.hidden_states(states)
        return [
            layout.kept_output(states, layer) if layer in layout.kept else hidden_states
            for layer in range(self.num_layers)
        ]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Apply the model's norm and head to the state after the last layer.

        Args:
            states: shape ``(windows, positions, layout.size)``; any positions.

        Returns:
            Logits, shape ``(windows, positions, vocab_size)``.
        """
        self._require(self._head)
        layout, states = self.layout, states.to(self.device)
        if layout.kept:
            outputs = [*self._outputs_of(states)[:-1], layout.hidden_states(states)]
            return self._logits_of(self._tokens_of(states), outputs)
        if (
            layout.has_tokens
        ):  # the model computes arguments of its layers from them, although the injector ignores these
            return self._logits_of(self._tokens_of(states), [layout.hidden_states(states)])
        # The injector ignores these values; passing them avoids loading the embedding.
        inputs_embeds = states.new_zeros(*states.shape[:2], self._embedding_size)
        with self._layers_replaced([Injector(layout.hidden_states(states), self._outputs, self.layers[0])]):
            return self.model(inputs_embeds=inputs_embeds, use_cache=False).logits

    def _logits_of(self, input_ids: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Run the model with given outputs of its layers; the last one is the output of the last layer."""
        injectors = [
            Injector(output, self._outputs, layer)
            for output, layer in zip(outputs, self.layers, strict=False)
        ]
        with self._layers_replaced(injectors):
            return cast(Tensor, self.model(input_ids=input_ids.to(self.device), use_cache=False).logits)

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
