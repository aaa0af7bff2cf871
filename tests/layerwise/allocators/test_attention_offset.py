"""Different sparsities for attention and MLP, on layers that can be checked by hand."""

import pytest

from layerwise.allocators.attention_offset import is_attention, with_offset

NAMES = [["self_attn.q_proj", "mlp.up_proj"]] * 2
SIZES = [[100, 300]] * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("self_attn.q_proj", True),  # LLaMA
        ("self_attn.out_proj", True),  # OPT
        ("attn.c_attn", True),  # GPT-2
        ("attention.dense", True),  # GPT-NeoX
        ("self_attention.query_key_value", True),  # BLOOM, Falcon
        ("mlp.c_proj", False),
        ("fc1", False),
        ("mlp.dense_h_to_4h", False),
    ],
)
def test_attention_is_recognized_by_its_name(name, expected):
    assert is_attention(name) is expected


def test_an_offset_raises_attention_and_keeps_the_sparsity_of_the_layer():
    plan = with_offset([0.4, 0.6], 0.2, NAMES, SIZES, 0.5)
    assert plan[0] == pytest.approx((0.55, 0.35))
    assert plan[1] == pytest.approx((0.75, 0.55))


def test_a_negative_offset_lowers_the_sparsity_of_attention():
    assert with_offset([0.5, 0.5], -0.2, NAMES, SIZES, 0.5)[0] == pytest.approx((0.35, 0.55))


def test_offset_0_gives_every_linear_the_sparsity_of_its_layer():
    assert with_offset([0.4, 0.6], 0.0, NAMES, SIZES, 0.5) == ((0.4, 0.4), (0.6, 0.6))


def test_sparsities_outside_the_range_are_clipped_and_the_target_is_still_met():
    plan = with_offset([0.1, 0.9], 0.8, NAMES, SIZES, 0.5)
    assert all(0 <= share <= 1 for layer in plan for share in layer)
    removed = sum(
        s * n for layer, sizes in zip(plan, SIZES, strict=True) for s, n in zip(layer, sizes, strict=True)
    )
    assert removed == pytest.approx(0.5 * 800)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="no layer has both attention linears and other linears"):
        with_offset([0.5], 0.1, [["mlp.up_proj"]], [[10]], 0.5)
