"""Windows of token ids."""

import pytest
import torch

from layerwise.calibration.windows import consecutive_windows, part_bounds, random_windows, require_tokens


def test_consecutive_windows_are_adjacent_and_the_remainder_is_dropped():
    assert consecutive_windows(torch.arange(8), None, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_fewer_consecutive_windows_are_the_first_ones():
    assert consecutive_windows(torch.arange(8), 1, 3).tolist() == [[0, 1, 2]]


def test_random_windows_are_parts_of_the_stream_and_never_overlap():
    for seed in range(50):
        windows = random_windows(torch.arange(1000), windows=30, seqlen=32, seed=seed)
        assert windows.shape == (30, 32)
        assert (windows.diff(dim=1) == 1).all()
        assert windows.unique().numel() == 30 * 32


def test_random_windows_start_anywhere_not_only_at_multiples_of_their_length():
    starts = {int(random_windows(torch.arange(100), 1, 10, seed)[0, 0]) for seed in range(500)}
    assert starts == set(range(91))


def test_the_minimum_number_of_tokens_suffices_for_random_windows():
    for seed in range(50):
        assert random_windows(torch.arange(40), 4, 10, seed).sort(dim=0).values.flatten().tolist() == list(
            range(40)
        )


def test_equal_seeds_give_equal_windows_and_others_do_not():
    stream = torch.arange(10_000)
    assert torch.equal(random_windows(stream, 8, 16, seed=1), random_windows(stream, 8, 16, seed=1))
    assert not torch.equal(random_windows(stream, 8, 16, seed=1), random_windows(stream, 8, 16, seed=2))


def test_random_windows_do_not_depend_on_the_global_seed():
    torch.manual_seed(1)
    first = random_windows(torch.arange(1000), 8, 16, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first, random_windows(torch.arange(1000), 8, 16, seed=0))
    assert torch.initial_seed() == 2


def test_windows_do_not_share_memory_with_the_stream():
    stream = torch.arange(8)
    consecutive_windows(stream, 2, 4).zero_()
    random_windows(stream, 2, 4, seed=0).zero_()
    assert stream.tolist() == list(range(8))


def test_a_stream_that_is_too_short_is_refused_with_the_tokens_needed():
    with pytest.raises(ValueError, match="has 39 tokens, but 4 x 10 = 40 are needed.*3 of 10 tokens fit"):
        random_windows(torch.arange(39), 4, 10, seed=0)
    with pytest.raises(ValueError, match="has 39 tokens, but 4 x 10 = 40 are needed"):
        consecutive_windows(torch.arange(39), 4, 10)
    with pytest.raises(
        ValueError, match="has 9 tokens, but 1 x 10 = 10 are needed. Use a longer text or shorter"
    ):
        consecutive_windows(torch.arange(9), None, 10)


def test_the_advice_to_use_fewer_windows_is_given_only_if_it_helps():
    require_tokens(20, None, 10, least=2)
    with pytest.raises(
        ValueError, match="19 tokens, but 2 x 10 = 20 are needed. Use a longer text or shorter windows:"
    ):
        require_tokens(19, None, 10, least=2)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 100, 304_986])
def test_adjacent_parts_neither_omit_nor_share_a_token(tokens):
    edges = [0.0, 1 / 3, 0.5, 2 / 3, 1.0]
    bounds = [part_bounds(tokens, (start, end)) for start, end in zip(edges, edges[1:], strict=False)]
    assert [position for start, end in bounds for position in range(start, end)] == list(range(tokens))
