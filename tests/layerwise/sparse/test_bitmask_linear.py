"""Linears with a packed weight."""

import copy
import threading

import pytest
import torch
from torch import nn

from layerwise.sparse.bitmask import pack
from layerwise.sparse.bitmask_linear import KERNEL_TOKENS, SCRATCH_BYTES, BitmaskLinear
from tests.layerwise.sparse.shapes import DTYPES, require_product, sparse_weight

pytestmark = pytest.mark.usefixtures("best_kernel")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5), (2, 3, 4), (KERNEL_TOKENS,), (KERNEL_TOKENS + 1,), (2, 40), (0,)]
)
def test_inputs_of_any_shape_and_length(shape, dtype):
    weight, bias = sparse_weight((24, 70), 0.6, dtype), torch.arange(24).to(dtype)
    inputs = torch.randn(*shape, 70).to(dtype)
    outputs = BitmaskLinear(pack(weight), bias)(inputs)
    assert outputs.shape == (*shape, 24)
    require_product(outputs.flatten(0, -2), inputs.flatten(0, -2), weight, bias)


def test_inputs_may_be_a_view():
    weight = sparse_weight((24, 70), 0.6)
    linear = BitmaskLinear(pack(weight))
    inputs = torch.randn(70, 5).T
    require_product(linear(inputs), inputs, weight)
    some = torch.randn(5, 100)[:, 30:]
    require_product(linear(some), some, weight)


def test_a_weight_larger_than_the_buffer_is_multiplied_in_blocks():
    columns = 64
    weight = sparse_weight((SCRATCH_BYTES // columns // 4 + 3, columns), 0.7)
    inputs = torch.randn(KERNEL_TOKENS + 1, columns)
    require_product(BitmaskLinear(pack(weight))(inputs), inputs, weight)


def test_threads_that_run_the_same_linear_do_not_share_a_buffer():
    weight = sparse_weight((300, 400), 0.7)
    linear, outputs = BitmaskLinear(pack(weight)), {}
    inputs = {name: torch.randn(64, 400) for name in range(4)}
    alone = {name: linear(tokens) for name, tokens in inputs.items()}

    def run(name: int) -> None:
        outputs[name] = [linear(inputs[name]) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(name,)) for name in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(product, alone[name]) for name, products in outputs.items() for product in products
    )


def test_int8_values_give_the_product_with_the_scaled_values():
    weight = sparse_weight((24, 70), 0.6, torch.bfloat16)
    linear = BitmaskLinear(pack(weight), int8=True)
    for tokens in (3, 30):
        inputs = torch.randn(tokens, 70).bfloat16()
        step = inputs.double().abs().amax(dim=1, keepdim=True) / 32767
        require_product(linear(inputs), inputs, linear.panels.dense(), rounded_by=step / 2, twice=True)
    assert (linear.weight.float() - weight.float()).abs().max() < weight.float().abs().max() / 127


@pytest.mark.parametrize("bias", [None, torch.ones(4)])
def test_a_packed_linear_is_saved_as_an_ordinary_linear_and_cannot_load_weights(bias):
    weight = sparse_weight((4, 9), 0.5)
    linear = BitmaskLinear(pack(weight), bias)
    ordinary = nn.Linear(9, 4, bias=bias is not None)
    ordinary.load_state_dict(linear.state_dict())
    assert torch.equal(ordinary.weight, weight)
    with pytest.raises(RuntimeError, match="cannot load weights"):
        linear.load_state_dict(ordinary.state_dict())


def test_a_copy_does_not_share_its_parts():
    linear = BitmaskLinear(pack(sparse_weight((4, 9), 0.5)))
    other, inputs = copy.deepcopy(linear), torch.randn(2, 9)
    before = linear(inputs)
    other.panels.values.zero_()
    assert torch.equal(linear(inputs), before)
    assert not other(inputs).any()


def test_only_inputs_that_require_a_gradient_are_refused():
    linear = BitmaskLinear(pack(torch.eye(3)))
    assert linear(torch.ones(1, 3)).tolist() == [[1, 1, 1]]
    with torch.no_grad():
        linear(torch.ones(1, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="for inference"):
        linear(torch.ones(1, 3, requires_grad=True))


def test_mixtures_of_dtypes_are_refused_as_by_a_dense_linear():
    linear = BitmaskLinear(pack(torch.eye(3)), torch.zeros(3))
    for tokens in (1, 30):
        with pytest.raises(TypeError, match="float32 weight .* torch.bfloat16 inputs"):
            linear(torch.ones(tokens, 3).bfloat16())
    with pytest.raises(TypeError, match="a torch.bfloat16 bias"):
        linear.bfloat16()(torch.ones(1, 3))
    with pytest.raises(ValueError, match="does not match a torch.float32 bias"):
        BitmaskLinear(pack(torch.eye(3).bfloat16()), torch.zeros(3))


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_kernel_the_dense_weight_is_used(dtype):
    weight, inputs = sparse_weight((24, 70), 0.6, dtype), torch.randn(3, 70).to(dtype)
    require_product(BitmaskLinear(pack(weight))(inputs), inputs, weight)
