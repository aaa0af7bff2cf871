"""Pruners that correct weights, in lanes and exports: one capture of Gram matrices, one factor for all lanes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from layerwise.pruners.alps import ALPS
from layerwise.pruners.dsnot import DSnoT
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda_swaps import WandaSwaps
from layerwise.storage.tables import read_table
from layerwise.tasks.lanes.gram_matrices import read_grams

MODELS = {
    "llama": lambda: None,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64)
    ),
}


def test_grams_are_the_second_moments_and_with_sums_the_first_ones_of_the_inputs_of_every_linear(small_run):
    run = small_run(pruner=DSnoT())
    model, inputs = run.transformers_model(), {}

    def keep(name):
        def hook(module, arguments):
            inputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1])

        return hook

    for linear in run.linears[1]:
        model.model.layers[1].get_submodule(linear.name).register_forward_pre_hook(keep(linear.name))
    with torch.no_grad():
        model(input_ids=run.input_ids("calibration"))
    found = {tuple(names): gram for names, gram in read_grams(run.store, run.grams(), 1)}
    assert list(map(set, found)) == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]
    for names, gram in found.items():
        expected = inputs[names[0]].T @ inputs[names[0]]
        torch.testing.assert_close(gram.gram, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gram.sums.float(), inputs[names[0]].sum(dim=0), rtol=1e-4, atol=1e-4)
        assert gram.tokens == 5 * 12


@pytest.fixture
def small_panels(monkeypatch):
    """Split the matrices of a small model (32 and 48 inputs) into panels, computed and stored alike."""
    for module in ("upper_triangle", "gram"):
        monkeypatch.setattr(f"layerwise.calibration.{module}.PANEL", 20)


def test_only_the_upper_panels_are_stored_and_the_matrices_read_are_whole(small_run, small_panels):
    run = small_run(pruner=SparseGPT())
    grams = run.grams()
    stored = grams.files["grams/layer-00001.safetensors"].tensors
    down = {key: entry.shape for key, entry in stored.items() if key.startswith("mlp.down_proj")}
    assert down == {"mlp.down_proj": (20, 48), "mlp.down_proj/20": (20, 28), "mlp.down_proj/40": (8, 8)}
    for _, gram in read_grams(run.store, grams, 1):
        assert torch.equal(gram.gram, gram.gram.T)


@pytest.mark.parametrize("pruner", [SparseGPT(block_size=16), ALPS(), WandaSwaps()])
def test_whole_matrices_of_older_stores_are_read_and_give_the_same_lane(
    small_run, another_store, small_panels, monkeypatch, pruner
):
    run = small_run(pruner=pruner)
    old = small_run(run.folder, store=another_store(), pruner=pruner)
    with monkeypatch.context() as patch:
        patch.setattr("layerwise.tasks.lanes.gram_matrices.upper_panels", lambda matrix: [(0, matrix)])
        old_grams = old.grams()
    (linears, *_) = old_grams.files["grams/layer-00001.safetensors"].tensors
    assert old_grams.files["grams/layer-00001.safetensors"].tensors[linears].shape == (32, 32)
    assert old_grams.key == run.grams().key
    (lane,), (old_lane,) = run.branch(0.1), old.branch(0.1)
    assert lane.losses == old_lane.losses
    exported, old_exported = run.export(lane).files, old.export(old_lane).files
    weights = [name for name in exported if name.endswith(".safetensors")]
    assert weights
    assert all(exported[name].digest == old_exported[name].digest for name in weights)


@pytest.mark.parametrize("pruner", [SparseGPT(block_size=16), ALPS(), WandaSwaps(), DSnoT()])
@pytest.mark.parametrize("family", MODELS)
def test_an_exported_lane_has_the_losses_of_the_lane(small_run, family, pruner):
    run = small_run(MODELS[family](), pruner=pruner)
    flat, steep = run.branch(0.0, 0.2)
    for lane in (flat, steep):
        assert run.losses(run.exported_model(lane), "selection") == pytest.approx(lane.losses, rel=1e-4)
        assert lane.realised_sparsity == 0.5


def test_a_lane_does_not_depend_on_its_group(small_run, another_store):
    run = small_run(pruner=SparseGPT())
    together = run.branch(0.0, 0.1, 0.2)
    elsewhere = small_run(run.folder, store=another_store(), pruner=SparseGPT())
    (alone,) = elsewhere.branch(0.1)
    assert (alone.artifact.key, alone.artifact.content) == (
        together[1].artifact.key,
        together[1].artifact.content,
    )


def test_each_input_is_prepared_once_for_all_lanes_and_linears_that_share_it(small_run, monkeypatch):
    run, prepared = small_run(pruner=SparseGPT()), []
    prepare = SparseGPT.prepare

    def counted(pruner, gram, tokens, overwrite=False):
        prepared.append(len(gram))
        return prepare(pruner, gram, tokens, overwrite)

    monkeypatch.setattr(SparseGPT, "prepare", counted)
    run.branch(0.0, 0.05, 0.1, 0.2)
    assert prepared == [32, 32, 32, 48] * 3  # q, k and v; o; gate and up; down


@pytest.mark.parametrize("pruner", [SparseGPT(block_size=16), ALPS(), WandaSwaps()])
def test_pruning_by_second_moments_has_a_smaller_error_than_wanda(small_run, another_store, pruner):
    store, windows = another_store(), {"calibration": 60}  # 15 tokens for each channel of the widest input
    corrected = small_run(store=store, pruner=pruner, windows=windows)
    plain = small_run(corrected.folder, store=store, windows=windows)
    assert corrected.errors()[-1] < plain.errors()[-1]


def test_a_failed_factorisation_names_layer_and_linears_and_what_to_raise(small_run):
    run = small_run(pruner=SparseGPT(damping=0.0), windows={"calibration": 1})  # 12 tokens, 32 channels
    expected = r"^layer 0, self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: .*Raise the damping"
    with pytest.raises(ValueError, match=expected):
        run.branch(0.0)


@pytest.mark.parametrize("pruner", [None, SparseGPT(), ALPS(), WandaSwaps()])
@pytest.mark.parametrize(("pattern", "target"), [("2:4", 0.5), ("4:8", 0.5), ("N:8", 0.625)])
def test_every_group_of_the_exported_weights_follows_the_pattern(small_run, pattern, target, pruner):
    run = small_run(pattern=pattern, target=target, **({"pruner": pruner} if pruner else {}))
    (lane,) = run.branch(0.0)
    folder = run.store.location(run.export(lane))
    weights = {}
    for file in sorted(run.store.fs.glob(f"{folder}/*.safetensors")):
        weights |= load_file(file)
    group = int(pattern[-1])
    for index, layer in enumerate(run.linears):
        for linear in layer:
            weight = weights[f"model.layers.{index}.{linear.name}.weight"]
            removed = (weight.reshape(-1, group) == 0).sum(dim=1)
            assert set(removed.tolist()) == {round(group * target)}, linear.name
    assert lane.realised_sparsity == target


@pytest.mark.parametrize("pruner", [None, SparseGPT()])
def test_excluded_linears_stay_dense_and_do_not_count(small_run, pruner):
    run = small_run(exclude=r"^0\.mlp|k_proj$", **({"pruner": pruner} if pruner else {}))
    (lane,) = run.branch(0.1)
    assert lane.realised_sparsity == pytest.approx(0.5, abs=1e-4)
    rows = read_table(run.store, lane.artifact, "linears.parquet").to_pylist()
    assert not [
        row for row in rows if "k_proj" in row["linear"] or (row["layer"] == 0 and "mlp" in row["linear"])
    ]
    before, after = run.transformers_model(), run.exported_model(lane)
    for name in ("layers.0.mlp.up_proj", "layers.0.self_attn.k_proj", "layers.2.self_attn.k_proj"):
        assert torch.equal(before.model.get_submodule(name).weight, after.model.get_submodule(name).weight)
    assert (after.model.layers[0].self_attn.q_proj.weight == 0).any()
