"""Decoder layers of small random models, pruned by magnitude."""

from contextlib import ExitStack

import pytest
import torch

from layerwise.models.hidden_states import batches
from layerwise.recovery.pruned_layer import LayerToRecover, PrunedLinear

WINDOWS, SEQLEN = 8, 16


@pytest.fixture
def pruned_layer(tiny_model):
    """Load layer 1 of a small model and remove half of the weights of every linear, the smallest in each row.

    The hidden states are random; those of the pruned model differ from the dense ones by ``noise``.
    """
    with ExitStack() as stack:

        def load(
            family="llama",
            dtype=torch.float32,
            stored=None,
            noise=0.1,
            windows=WINDOWS,
            exclude=None,
            **changes,
        ):
            tiny = tiny_model(family, **changes)
            model = tiny.streamed(dtype)
            layer = stack.enter_context(model.loaded(1, tiny.layers()[1]))
            generator = torch.Generator().manual_seed(3)
            dense_states = torch.randn(windows, SEQLEN, 32, generator=generator)
            hidden_states = dense_states + noise * torch.randn(dense_states.shape, generator=generator)
            linears = []
            for linear in model.linears[1]:
                if exclude is not None and exclude in linear.name:
                    continue
                parameter = layer.get_submodule(linear.name).weight
                dense = parameter.detach().clone()
                smallest = linear.oriented(dense).abs().argsort(dim=1)[:, : linear.in_features // 2]
                mask = torch.zeros(linear.out_features, linear.in_features, dtype=torch.bool)
                mask = linear.oriented(mask.scatter_(1, smallest, True))
                parameter.data.masked_fill_(mask, 0)
                linears.append(PrunedLinear(linear, dense, mask, dense.to(stored or dtype)))
            streams = hidden_states.to(dtype), dense_states.to(dtype)
            rooms = torch.empty_like(streams[0]), torch.empty_like(streams[0])
            return LayerToRecover(model, 1, layer, linears, *streams, rooms)

        yield load


@pytest.fixture
def inputs_of_linears():
    """Return the inputs of all linears of a layer for some windows, by name, shape ``(tokens, in_features)``."""

    def run(pruned, hidden_states):
        found = {}

        def remember(name):
            return lambda module, inputs: found.setdefault(name, []).append(
                inputs[0].reshape(-1, inputs[0].shape[-1]).float().clone()
            )

        names = [each.linear.name for each in pruned.linears]
        hooks = [pruned.layer.get_submodule(name).register_forward_pre_hook(remember(name)) for name in names]
        for states in batches(hidden_states):
            pruned.run(states)
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(inputs) for name, inputs in found.items()}

    return run
