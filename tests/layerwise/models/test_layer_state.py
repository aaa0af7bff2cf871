"""Layout of the state between decoder layers."""

import pytest
import torch

from layerwise.models.layer_state import StateLayout, TokenTensor


@pytest.mark.parametrize("width", [6, 7])  # an odd width puts the tokens at an odd place
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3)])
def test_token_ids_are_kept_exactly(width: int, shape: tuple[int, int]) -> None:
    layout = StateLayout(TokenTensor(0, 1, (width,), torch.bfloat16), torch.bfloat16, has_tokens=True)
    input_ids = torch.randint(0, 1 << 20, shape)
    states = layout.begin(torch.randn(*shape, width).bfloat16(), input_ids)
    assert torch.equal(layout.tokens(states), input_ids)
    assert torch.equal(layout.tokens(states[:, -1:]), input_ids[:, -1:])
