"""Dequantization: equal to transformers bit for bit, and to the definition where transformers refuses."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from layerwise.models.dequantization import dequantize_fp8, dequantize_mxfp4


def float8(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (100 * torch.randn(shape, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(12, 8), (2, 12, 8)], ids=["matrix", "experts"])
def test_fp8_is_dequantized_as_by_transformers(shape, dtype):
    weight = float8(*shape)
    exponents = torch.randint(110, 130, (*shape[:-2], 3, 2), generator=torch.Generator().manual_seed(1))
    if dtype == torch.uint8:
        scales = exponents.to(dtype)
    else:
        scales = ((exponents - 127).float().exp2() * (1 if dtype == torch.float8_e8m0fnu else 1.3)).to(dtype)
    parts = {"weight": weight, "weight_scale_inv": scales}
    expected = Fp8Dequantize(None).convert(parts, full_layer_name="weight")["weight"].to(torch.bfloat16)
    for block in ((4, 4), None):
        assert torch.equal(dequantize_fp8(weight, scales, block, torch.bfloat16), expected)


def test_one_scale_may_hold_for_the_whole_weight():
    weight = float8(4, 6)
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        assert torch.equal(dequantize_fp8(weight, scale, None, torch.float32), weight.float() / 2)


def test_blocks_at_the_edge_may_be_smaller():
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    result = dequantize_fp8(torch.ones(3, 3).to(torch.float8_e4m3fn), scales, (2, 2), torch.float32)
    assert result.tolist() == [[1, 1, 2], [1, 1, 2], [4, 4, 8]]


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(6, 4\) has scales of shape \(4, 2\).* blocks of 2 x 2"):
        dequantize_fp8(float8(6, 4), torch.ones(4, 2), (2, 2), torch.bfloat16)


def test_mxfp4_is_dequantized_as_by_transformers():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 130, (2, 6, 3), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert expected.shape == (2, 96, 6)
    assert torch.equal(dequantize_mxfp4(blocks, scales, torch.bfloat16), expected)
    with pytest.raises(ValueError, match=r"shape \(2, 6, 3, 16\) have scales of shape \(2, 3, 6\)"):
        dequantize_mxfp4(blocks, scales.transpose(1, 2), torch.bfloat16)
