"""Speed measurements with several engines: which are measured, not how fast they are."""

import ctypes
import gc

import pytest
import torch

from layerwise.sparse import engines as engines_module
from layerwise.sparse.engines import BFLOAT16, FLOAT32, INT8, SPARSE
from layerwise.sparse.openvino_linear import OpenVinoLinear
from layerwise.sparse.speed import measure_speed
from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.sparse.timing import in_turns
from tests.layerwise.sparse.test_accelerate import pruned_model

QUICK = SpeedSettings(prompt_tokens=20, new_tokens=3, rounds=2)


@pytest.mark.usefixtures("best_kernel")
def test_every_engine_is_measured_and_the_model_does_not_change(monkeypatch):
    monkeypatch.setattr(engines_module, "has_openvino", lambda: False)
    model = pruned_model("llama", torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    windows = torch.randint(3, 61, (3, 24))
    table = measure_speed(model, QUICK, windows)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [each.way for each in table.speeds] == [FLOAT32, BFLOAT16, SPARSE, INT8]
    float32, bfloat16, sparse, int8 = table.speeds
    linears = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert bfloat16.weight_bytes == linears
    assert float32.weight_bytes == 2 * linears
    # At 70 %: 3 of 10 values in 2 bytes or 1, one bit per weight, and 8 bytes per row of 512 or 768.
    assert sparse.weight_bytes == pytest.approx((0.3 + 1 / 16) * linears, rel=0.05)
    assert int8.weight_bytes == pytest.approx((0.15 + 1 / 16) * linears, rel=0.08)
    assert (sparse.linears, int8.linears, bfloat16.linears) == (14, 14, 15)
    assert bfloat16.to_bfloat16 == float32.to_float32 == 1
    assert all(each.decode > 0 and each.prefill > 0 and each.of_limit > 0 for each in table.speeds)
    assert list(table.left_out) == ["OpenVINO"]
    expected = torch.stack([model(window[None], labels=window[None]).loss for window in windows]).mean().exp()
    assert bfloat16.perplexity == pytest.approx(expected.item(), rel=1e-3)
    assert sparse.perplexity == pytest.approx(bfloat16.perplexity, rel=1e-3)
    assert int8.perplexity == pytest.approx(bfloat16.perplexity, rel=1e-2)
    assert float32.perplexity is None


@pytest.mark.usefixtures("best_kernel")
def test_a_dense_model_is_not_measured_as_a_sparse_one():
    table = measure_speed(pruned_model("gpt2", torch.bfloat16, sparsity=0), QUICK)
    assert {SPARSE, INT8} <= set(table.left_out)
    assert table.left_out[SPARSE].startswith("no linear runs sparse: ")
    assert "sparsity below" in table.left_out[SPARSE]
    assert {each.way for each in table.speeds} >= {FLOAT32, BFLOAT16}


@pytest.mark.usefixtures("best_kernel")
def test_an_engine_that_needs_too_much_memory_is_left_out(monkeypatch):
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(engines_module.psutil, "virtual_memory", lambda: free)
    table = measure_speed(pruned_model("qwen2", torch.bfloat16), QUICK)
    assert "but only 0.0 GB are free" in table.left_out[FLOAT32]
    assert all(each.to_float32 is None for each in table.speeds)


@pytest.mark.usefixtures("best_kernel")
def test_a_float32_model_is_not_measured_in_bfloat16():
    table = measure_speed(pruned_model("llama", torch.float32), QUICK, torch.randint(3, 61, (2, 24)))
    speeds = {each.way: each for each in table.speeds}
    assert BFLOAT16 not in speeds
    assert table.left_out[BFLOAT16] == "this CPU has no fast bfloat16 instructions"
    assert speeds[SPARSE].to_bfloat16 is None
    assert speeds[SPARSE].to_float32 > 0
    assert speeds[SPARSE].perplexity == pytest.approx(speeds[FLOAT32].perplexity, rel=1e-4)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"the model is in torch.float16. Load it with dtype=torch.bfloat16"):
        measure_speed(pruned_model("llama", torch.float16), QUICK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_openvino_linear_computes_the_same(dtype):
    linear = torch.nn.Linear(96, 40, dtype=dtype)
    other = OpenVinoLinear(linear)
    for shape in ((1, 1, 96), (3, 5, 96)):
        inputs = torch.randn(shape, dtype=dtype)
        expected = linear(inputs)
        assert (other(inputs) - expected).norm() / expected.norm() < (
            1e-2 if dtype == torch.bfloat16 else 1e-5
        )


def signal_stack() -> int | None:
    """Return the address of this thread's signal stack: the first field of the result of sigaltstack(2)."""
    stack = (ctypes.c_void_p * 3)()
    assert ctypes.CDLL(None).sigaltstack(None, stack) == 0
    return stack[0]


def test_several_openvino_linears_do_not_change_the_signal_stack():
    """Otherwise the next signal, such as Ctrl-C, uses freed memory."""
    OpenVinoLinear(torch.nn.Linear(8, 8))
    before = signal_stack()
    several = [OpenVinoLinear(torch.nn.Linear(8, 8)) for _ in range(3)]
    assert signal_stack() == before
    del several
    gc.collect()
    assert signal_stack() == before


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"new_tokens": 1}, {"rounds": 0}])
def test_speed_settings_that_are_too_small_are_refused(wrong):
    with pytest.raises(ValueError, match="speed cannot be measured"):
        SpeedSettings(**wrong)


def test_every_round_starts_with_another_call():
    calls = []

    def call(name: str) -> int:
        calls.append(name)
        return len(calls)

    measured = in_turns({name: lambda name=name: call(name) for name in "abc"}, 3)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert measured == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}
    with pytest.raises(ValueError, match="rounds is 0"):
        in_turns({}, 0)
