"""Gram matrices of the inputs of linears, and the linears that share them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibration.gram import InputGram, collect_grams, linears_by_input, require_full_float32
from layerwise.models.skeleton import Linear, linears_of


class Layer(nn.Module):
    """Linears q, k, v and o of two features, run in the way that is given."""

    def __init__(self, forward: Callable[["Layer", Tensor], object]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(2, 2, bias=False) for _ in range(4))
        self._forward = forward

    def forward(self, hidden_states: Tensor) -> object:
        return self._forward(self, hidden_states)


def attention(layer: Layer, hidden_states: Tensor) -> Tensor:
    layer.k(hidden_states), layer.v(hidden_states)
    return layer.o(layer.q(hidden_states))


def watched(layer: nn.Module, *batches: Tensor) -> dict[str, InputGram]:
    with torch.no_grad(), collect_grams(layer, linears_of(layer)) as grams:
        for batch in batches:
            layer(batch)
    return grams


def gram_of(*batches: Tensor) -> InputGram:
    gram = InputGram.empty(batches[0].shape[-1])
    for batch in batches:
        gram.add(batch)
    return gram


@pytest.fixture
def precision() -> Iterator[None]:
    """Restore the process-wide precision after the test."""
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_gram_of_two_tokens_by_hand():
    # (1, 2) and (3, -1): 1 + 9, 2 - 3, 4 + 1.
    gram = gram_of(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]))
    assert gram.gram.tolist() == [[10, -1], [-1, 5]]
    assert gram.tokens == 2


def test_batches_of_any_shape_add_up():
    gram = gram_of(torch.tensor([1.0, 0.0]), torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]]))
    assert gram.gram.tolist() == [[2, 1], [1, 5]]
    assert gram.tokens == 3


@pytest.mark.parametrize("panel", [1, 3, 4, 7, 100])
def test_panels_of_any_width_give_the_whole_symmetric_matrix(monkeypatch, panel):
    monkeypatch.setattr("layerwise.calibration.gram.PANEL", panel)
    tokens = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    gram = gram_of(*tokens.split(11)).gram
    torch.testing.assert_close(gram.double(), tokens.double().T @ tokens.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram, gram.T)


def test_small_bfloat16_addends_are_not_lost():
    ones = torch.ones(1, 2, dtype=torch.bfloat16)
    assert gram_of(*[ones] * 1000, ones.expand(4001, 2)).gram.tolist() == [[5001, 5001], [5001, 5001]]


def test_large_float16_inputs_do_not_overflow():
    gram = gram_of(torch.tensor([[300.0, -300.0]], dtype=torch.float16)).gram
    assert gram.tolist() == [[90000, -90000], [-90000, 90000]]


def test_inputs_are_left_unchanged():
    tokens = torch.tensor([[1.0, 2.0]])
    gram_of(tokens, tokens)
    assert tokens.tolist() == [[1, 2]]


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 3\) were added to the Gram matrix of 2 features"):
        InputGram.empty(2).add(torch.ones(4, 3))


@pytest.mark.parametrize("reduced", ["high", "medium"])
def test_reduced_precision_is_refused_and_not_used(precision, reduced):
    torch.set_float32_matmul_precision(reduced)
    with pytest.raises(
        RuntimeError, match=r"set_float32_matmul_precision\('highest'\) when the process starts"
    ):
        InputGram.empty(2).add(torch.ones(1, 2))
    torch.set_float32_matmul_precision("highest")
    require_full_float32()


def test_tensor_cores_allowed_for_cuda_alone_are_refused_too(precision):
    torch.backends.cuda.matmul.allow_tf32 = True
    with pytest.raises(RuntimeError, match="allowed to run in tf32"):
        require_full_float32()


def test_linears_with_the_same_input_share_one_gram():
    grams = watched(Layer(attention), torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -1.0]]]))
    assert grams["q"] is grams["k"] is grams["v"]
    assert grams["o"] is not grams["q"]
    assert grams["q"].gram.tolist() == [[10, -1], [-1, 5]]
    assert grams["q"].tokens == grams["o"].tokens == 2


def test_the_groups_are_listed_in_the_order_of_the_pass():
    assert linears_by_input(watched(Layer(attention), torch.ones(1, 1, 2))) == (("k", "v", "q"), ("o",))


def test_equal_inputs_in_different_tensors_are_not_shared():
    def forward(layer: Layer, hidden_states: Tensor) -> None:
        layer.q(hidden_states), layer.k(hidden_states.clone())

    assert linears_by_input(watched(Layer(forward), torch.ones(1, 1, 2))) == (("q",), ("k",))


def test_temporary_tensors_within_a_pass_are_distinguished():
    """The address and the id of a freed tensor are reused by the next one."""

    def forward(layer: Layer, hidden_states: Tensor) -> None:
        for scale, name in enumerate("qkvo", 1):
            layer.get_submodule(name)(hidden_states * scale)

    grams = watched(Layer(forward), *[torch.ones(1, 1, 2)] * 3)
    assert [grams[name].gram[0, 0].item() for name in "qkvo"] == [3, 12, 27, 48]


def test_an_input_changed_in_place_counts_as_another_input():
    def forward(layer: Layer, hidden_states: Tensor) -> None:
        layer.q(hidden_states)
        layer.k(hidden_states.mul_(3))

    grams = watched(Layer(forward), torch.ones(1, 1, 2))
    assert (grams["q"].gram[0, 0], grams["k"].gram[0, 0]) == (1, 9)


def test_linears_that_are_not_adjacent_can_share_an_input():
    """In parallel attention, the first linear of the MLP has the same input as q, k and v."""

    def forward(layer: Layer, hidden_states: Tensor) -> None:
        layer.o(layer.q(hidden_states))
        layer.v(hidden_states)

    assert linears_by_input(watched(Layer(forward), torch.ones(1, 1, 2))) == (("q", "v"), ("o",))


def test_the_same_tensor_in_two_passes_counts_twice():
    batch = torch.tensor([[[1.0, 2.0]]])
    assert watched(Layer(attention), batch, batch)["v"].gram.tolist() == [[2, 4], [4, 8]]


def test_the_gram_does_not_depend_on_how_tokens_are_batched():
    tokens = torch.randn(24, 8, 2, generator=torch.Generator().manual_seed(0))
    layer, expected = Layer(attention), tokens.reshape(-1, 2).T @ tokens.reshape(-1, 2)
    for windows in (1, 5, 24):
        gram = watched(layer, *tokens.split(windows))["k"]
        torch.testing.assert_close(gram.gram, expected, rtol=1e-5, atol=1e-5)
        assert gram.tokens == 192


def alternating(*forwards: Callable[[Layer, Tensor], object]) -> Callable[[Layer, Tensor], object]:
    """Each pass runs in the next one of the ways."""
    rest = iter(forwards)
    return lambda layer, hidden_states: next(rest)(layer, hidden_states)


def together(layer: Layer, hidden_states: Tensor) -> None:
    layer.q(hidden_states), layer.k(hidden_states)


def apart(layer: Layer, hidden_states: Tensor) -> None:
    layer.q(hidden_states), layer.k(hidden_states + 1)


def without_k(layer: Layer, hidden_states: Tensor) -> None:
    layer.q(hidden_states)


@pytest.mark.parametrize(
    "first, later, words",
    [(together, apart, r"k\+q in .* as k \| q"), (apart, together, r"k \| q in .* as k\+q")]
    + [(together, without_k, r"k\+q in .* as q in"), (without_k, together, r"q in .* as k\+q in")],
)
def test_passes_that_share_inputs_differently_are_refused(first, later, words):
    with pytest.raises(ValueError, match=f"shared their inputs as {words}.*mixed up"):
        watched(Layer(alternating(first, first, later)), *[torch.ones(1, 1, 2)] * 3)


def test_the_order_within_a_pass_may_change():
    def other_order(layer: Layer, hidden_states: Tensor) -> None:
        layer.k(hidden_states), layer.q(hidden_states)

    grams = watched(Layer(alternating(together, other_order)), *[torch.ones(1, 1, 2)] * 2)
    assert grams["q"] is grams["k"]
    assert grams["q"].tokens == 2


def test_a_linear_that_runs_twice_in_a_pass_is_refused():
    def forward(layer: Layer, hidden_states: Tensor) -> None:
        layer.q(layer.q(hidden_states))

    with pytest.raises(ValueError, match="q ran twice in one pass"):
        watched(Layer(forward), torch.ones(1, 1, 2))


def test_a_failed_pass_does_not_affect_the_next():
    def failing(layer: Layer, hidden_states: Tensor) -> None:
        layer.q(hidden_states)
        raise KeyError

    layer, batch = Layer(alternating(failing, together)), torch.ones(1, 1, 2)
    with collect_grams(layer, linears_of(layer)) as grams:
        with pytest.raises(KeyError):
            layer(batch)
        layer(batch)
    assert linears_by_input(grams) == (("q", "k"),)


def test_only_named_linears_that_run_are_watched():
    layer = Layer(together)
    with (
        torch.no_grad(),
        collect_grams(layer, [Linear("k", 2, 2, False), Linear("o", 2, 2, False)]) as grams,
    ):
        layer(torch.ones(1, 1, 2))
    assert grams.keys() == {"k"}


def test_hooks_are_removed_after_the_block_and_after_an_error():
    layer = Layer(attention)
    watched(layer, torch.ones(1, 1, 2))
    with pytest.raises(KeyError), collect_grams(layer, linears_of(layer)) as grams:
        raise KeyError
    layer(torch.ones(1, 1, 2))
    assert not grams
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"]),  # stored transposed
        ("falcon", ["query_key_value+dense_h_to_4h", "dense", "dense_4h_to_h"]),  # parallel attention
    ],
)
def test_the_layers_of_real_families_share_the_expected_inputs(tiny_model, family, expected):
    model = tiny_model(family)
    layer = model.reference.get_submodule(f"{model.layers_name}.0")
    linears = linears_of(layer)
    with torch.no_grad(), collect_grams(layer, linears) as grams:
        model.reference(torch.arange(10).reshape(2, 5))
    groups = ["+".join(name.rpartition(".")[2] for name in names) for names in linears_by_input(grams)]
    assert sorted(groups) == sorted(expected)
    for linear in linears:
        assert grams[linear.name].gram.shape == (linear.in_features, linear.in_features)
        assert grams[linear.name].tokens == 10
