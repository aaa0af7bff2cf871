"""Input statistics of linears."""

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibration.statistics import InputStatistics, collect_statistics
from layerwise.models.skeleton import Linear


class Attention(nn.Module):
    """Three linears on one tensor and a fourth on another, as in every decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2, width, bias=False) for width in (4, 2, 2))
        self.o = nn.Linear(4, 2, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.k(hidden_states), self.v(hidden_states)
        return self.o(self.q(hidden_states))


LINEARS = tuple(
    Linear(name, rows, columns, False)
    for name, rows, columns in [("q", 4, 2), ("k", 2, 2), ("v", 2, 2), ("o", 2, 4)]
)


def watched(*batches: Tensor, module: nn.Module | None = None) -> dict[str, InputStatistics]:
    layer = module or Attention()
    with torch.no_grad(), collect_statistics(layer, LINEARS) as statistics:
        for batch in batches:
            layer(batch)
    return statistics


def test_norms_are_taken_over_all_tokens_of_all_batches():
    statistics = watched(torch.tensor([[[3.0, 0.0], [0.0, 5.0]]]), torch.tensor([[[4.0, 12.0]]]))
    assert statistics["q"].norms.tolist() == [5, 13]
    assert statistics["q"].tokens == 3


def test_an_input_that_several_linears_share_counts_once_for_each_of_them():
    statistics = watched(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 4.0]]]))
    for name in ("q", "k", "v"):
        assert statistics[name].sum_of_squares.tolist() == [18, 32]
        assert statistics[name].tokens == 2


def test_the_same_tensor_twice_counts_twice():
    batch = torch.tensor([[[3.0, 4.0]]])
    assert watched(batch, batch, batch)["v"].sum_of_squares.tolist() == [27, 48]


def test_a_linear_after_another_sees_its_outputs():
    layer = Attention()
    nn.init.eye_(layer.q.weight)
    assert watched(torch.tensor([[[3.0, 4.0]]]), module=layer)["o"].norms.tolist() == [3, 4, 0, 0]


def test_statistics_do_not_depend_on_how_tokens_are_batched():
    tokens = torch.randn(24, 8, 2, generator=torch.Generator().manual_seed(0))
    layer = Attention()
    expected = tokens.double().square().sum(dim=(0, 1))
    for windows in (1, 5, 24):
        statistics = watched(*tokens.split(windows), module=layer)["k"]
        torch.testing.assert_close(statistics.sum_of_squares, expected, rtol=1e-6, atol=0)
        assert statistics.tokens == 192


def test_many_small_bfloat16_batches_are_summed_without_loss():
    layer = Attention().bfloat16()
    ones = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    assert watched(*[ones] * 1000, module=layer)["q"].sum_of_squares.tolist() == [1000, 1000]


def test_a_long_bfloat16_batch_is_summed_without_loss():
    layer = Attention().bfloat16()
    assert watched(torch.ones(1, 5001, 2, dtype=torch.bfloat16), module=layer)[
        "q"
    ].sum_of_squares.tolist() == [5001, 5001]


def test_a_total_beyond_the_precision_of_float32_still_grows():
    statistics = InputStatistics.empty(1)
    statistics.add(torch.tensor([2.0**24]), tokens=1)
    for _ in range(3):
        statistics.add(torch.ones(1), tokens=1)
    assert statistics.sum_of_squares.tolist() == [2**24 + 3]


def test_large_float16_inputs_do_not_overflow():
    layer = Attention().half()
    assert watched(torch.full((1, 4, 2), 300.0, dtype=torch.float16), module=layer)["q"].norms.tolist() == [
        600,
        600,
    ]


def test_hooks_are_removed_after_the_block():
    layer = Attention()
    statistics = watched(torch.ones(1, 1, 2), module=layer)
    layer(torch.ones(1, 1, 2))
    assert statistics["q"].tokens == 1


def test_hooks_are_removed_after_an_error():
    layer = Attention()
    with pytest.raises(KeyError), collect_statistics(layer, LINEARS) as statistics:
        raise KeyError
    layer(torch.ones(1, 1, 2))
    assert statistics["q"].tokens == 0


def test_only_named_linears_are_watched():
    with torch.no_grad(), collect_statistics(layer := Attention(), LINEARS[:1]) as statistics:
        layer(torch.ones(1, 1, 2))
    assert statistics.keys() == {"q"}


def test_statistics_without_a_token_are_zero():
    empty = InputStatistics.empty(3)
    assert (empty.tokens, empty.norms.tolist()) == (0, [0, 0, 0])
