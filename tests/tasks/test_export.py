"""Export: a folder that transformers loads, with a correct sparsity report and model card."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.storage.artifact import Damaged
from layerwise.storage.tables import read_table
from layerwise.storage.upkeep.garbage_collection import collect, plan_collection
from layerwise.tasks.export import export_stage
from layerwise.tasks.import_checkpoint import import_checkpoint, open_exported
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.results.evaluation import read_test
from layerwise.tasks.sources.checkpoint_files import copied_files

GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64}
QWEN2 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 97}
QWEN2_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def sources(llama):
    """Return a model and the options to save it with, by name."""

    def make(name):
        match name:
            case "sharded":
                return llama(num_hidden_layers=3, initializer_range=0.2), {"max_shard_size": "30KB"}
            case "tied, bfloat16":
                model = llama(num_hidden_layers=3, initializer_range=0.2, tie_word_embeddings=True)
                return model.to(torch.bfloat16), {}
            case "float16":
                return llama(num_hidden_layers=3, initializer_range=0.2).to(torch.float16), {}
            case "GPT-2":
                return GPT2LMHeadModel(GPT2Config(**GPT2)), {}
            case "GPT-2 without its head":  # its tensors are h.0..., not transformer.h.0...
                return GPT2Model(GPT2Config(**GPT2)), {}
            case "biases":
                return Qwen2ForCausalLM(Qwen2Config(**QWEN2, **QWEN2_HEADS)), {}

    return make


SOURCES = ["sharded", "tied, bfloat16", "float16", "GPT-2", "GPT-2 without its head", "biases"]
MODES = pytest.mark.parametrize("mode", ["dense", "sequential"])


@pytest.fixture(params=SOURCES)
def run(request, sources, small_run):
    """Return a run with each source, in the dtype of the source."""
    model, options = sources(request.param)
    return small_run(model, **options)


def exported(run, lane):
    return Path(run.store.location(run.export(lane)))


def tensors_of(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def pruned_names(run):
    """Return layer and linear by the name of the weight in the files of the source."""
    return {
        run.checkpoint.layer_tensors(index)[linear.weight_name].name: (index, linear)
        for index, layer in enumerate(run.linears)
        for linear in layer
    }


@MODES
def test_the_export_loaded_by_transformers_has_the_losses_of_the_lane(run, sources, small_run, mode):
    run = small_run(run.folder, calibration_mode=mode)
    lane = run.branch(0.0, 0.25)[1]
    folder = exported(run, lane)
    precision = 1e-5 if run.pruning.dtype == "float32" else 1e-3
    assert list(lane.losses) == pytest.approx(
        run.losses(run.transformers_model(folder), "selection"), rel=precision
    )
    tokenizers = [AutoTokenizer.from_pretrained(place)("hello big world") for place in (folder, run.folder)]
    assert tokenizers[0]["input_ids"] == tokenizers[1]["input_ids"]


def test_everything_that_is_not_pruned_equals_the_source_byte_for_byte(run):
    folder = exported(run, run.branch(0.25)[0])
    source, result, pruned = tensors_of(run.folder), tensors_of(folder), pruned_names(run)
    assert set(result) == set(source)
    for name, weight in source.items():
        assert result[name].dtype == weight.dtype
        if name in pruned:
            kept = result[name] != 0
            assert torch.equal(result[name][kept], weight[kept])
        else:
            assert torch.equal(result[name].view(torch.uint8), weight.view(torch.uint8))
    names = [file.name for file in run.folder.iterdir()]
    assert set(copied_files(names)) >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in copied_files(names):
        assert (folder / name).read_bytes() == (run.folder / name).read_bytes()


def test_models_with_equal_file_names_sizes_and_times_have_separate_results_in_one_store(
    small_run, save_model, llama
):
    runs = []
    for name in ("a", "b"):
        folder = save_model(llama(num_hidden_layers=3, initializer_range=0.5), name)
        for file in folder.iterdir():
            os.utime(file, (315532800, 315532800))
        runs.append(small_run(folder))
    listed = [{file.name: file.stat().st_size for file in run.folder.iterdir()} for run in runs]
    assert listed[0] == listed[1]
    for run in runs:
        (lane,) = run.branch(0.25)
        losses = torch.tensor(run.losses(run.transformers_model(), "test"))
        measured = read_test(run.store, run.evaluate(0.0, 0.25))
        assert measured.dense == pytest.approx(losses.mean().exp().item(), rel=1e-5)
        source, result = tensors_of(run.folder), tensors_of(exported(run, lane))
        for name, weight in source.items():
            assert torch.equal(weight[result[name] != 0], result[name][result[name] != 0])


@pytest.mark.parametrize("name", ["model-00002-of-00006.safetensors", "config.json"])
def test_an_export_that_was_changed_in_the_store_is_refused(small_run, name):
    run = small_run()
    artifact = run.export(run.branch(0.25)[0])
    assert open_exported(run.store, artifact).index.num_layers == 3
    file = Path(run.store.location(artifact)) / name
    content, times = bytearray(file.read_bytes()), file.stat()
    content[-2] = ord(" ") if name == "config.json" else content[-2] ^ 1  # config.json stays valid JSON
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(Damaged, match=r"export/.* damaged: .* has digest .*, but") as damaged:
        open_exported(run.store, artifact)
    assert damaged.value.key == artifact.key


def test_chat_templates_in_subfolders_are_exported_and_survive_a_collection(small_run, save_model, llama):
    folder = save_model(llama(num_hidden_layers=3, initializer_range=0.2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "a default", "rag": "with texts"}
    tokenizer.save_pretrained(folder)
    run = small_run(folder)
    result = exported(run, run.branch(0.25)[0])
    collect(run.store, plan_collection(run.store, now=time.time() + 1e9))
    assert AutoTokenizer.from_pretrained(result).chat_template == tokenizer.chat_template
    assert import_checkpoint(run.store, str(result)).tokenizer().chat_template == tokenizer.chat_template


def test_the_sparsity_report_matches_the_zeros_in_the_files(run):
    lane = run.branch(0.25)[0]
    folder = exported(run, lane)
    report, result = json.loads((folder / "sparsity.json").read_text()), tensors_of(folder)
    counted = {
        (index, linear.name): (result[name].numel(), int((result[name] == 0).sum()))
        for name, (index, linear) in pruned_names(run).items()
    }
    assert {(r["layer"], r["linear"]): (r["weights"], r["zeros"]) for r in report["linears"]} == counted
    for row in report["linears"]:
        assert row["sparsity"] == row["zeros"] / row["weights"]
    zeros, weights = (sum(pair[i] for pair in counted.values()) for i in (1, 0))
    assert zeros == round(0.5 * weights)
    assert report["realised"] == zeros / weights == lane.realised_sparsity
    assert report["layers"] == list(lane.plan.layers)
    assert (report["beta"], report["target"], report["pruner"]) == (0.25, 0.5, "wanda")
    assert report["calibration"] == "dense"


def test_the_zeros_match_the_count_of_the_lane(run):
    lane = run.branch(0.25)[0]
    report = json.loads(run.store.read(run.export(lane), "sparsity.json"))
    counted = read_table(run.store, lane.artifact, "linears.parquet").to_pylist()
    assert [{name: row[name] for name in counted[0]} for row in report["linears"]] == counted


def test_there_is_a_shard_per_outer_tensor_and_per_layer_named_as_by_hugging_face(small_run):
    run = small_run()
    folder = exported(run, run.branch(0.0)[0])
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    # Embedding, final norm, head, and three layers.
    assert shards == [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(folder).values())
    for shard in shards:
        with safe_open(folder / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {name for name, place in index["weight_map"].items() if place == shard} == set(file.keys())
            layers = {name.split(".")[2] for name in file.keys() if name.startswith("model.layers.")}  # noqa: SIM118
            assert len(layers) == (0 if shard in shards[:3] else 1)


def test_tensors_that_the_model_does_not_use_are_kept(small_run, save_model, edit_tensors):
    folder = save_model()
    buffers = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "model.rotary_emb.inv_freq": torch.arange(5.0),
    }
    edit_tensors(folder, lambda tensors: tensors.update(buffers))
    run = small_run(folder)
    result = tensors_of(exported(run, run.branch(0.0)[0]))
    for name, buffer in buffers.items():
        assert torch.equal(result[name], buffer)


def test_magnitude_removes_the_smallest_weights_of_every_linear(small_run):
    run = small_run(pruner=Magnitude())
    result = tensors_of(exported(run, run.branch(0.0)[0]))
    source = tensors_of(run.folder)
    for name in pruned_names(run):
        removed = result[name] == 0
        assert source[name][removed].abs().max() <= source[name][~removed].abs().min()


def test_the_model_card_agrees_with_the_results(small_run):
    run = small_run()
    uniform, lane = run.branch(0.0, 0.25)
    card = run.store.read(run.export(lane, uniform), "README.md").decode()
    losses = {
        "dense": run.losses(run.transformers_model(), "selection"),
        "uniform": run.losses(run.exported_model(uniform), "selection"),
        "**this model**": run.losses(run.exported_model(lane), "selection"),
    }
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if "| 3 x 12 |" in line
    ]
    assert [row[:3] for row in rows] == [[name, "selection text", "3 x 12"] for name in losses]
    for row, values in zip(rows, losses.values(), strict=True):
        perplexity = torch.tensor(values).mean().exp().item()
        assert float(row[3]) == pytest.approx(perplexity, abs=0.006, rel=1e-4)
    assert f"# {Path(run.folder).name}, 50.0 % sparse" in card
    assert str(Path(run.folder).parent) not in card, "where the model lay is nobody's business"
    assert "one-shot pruning with wanda" in card
    report = json.loads(run.store.read(run.export(lane, uniform), "sparsity.json"))
    for index, planned in enumerate(report["layers"]):
        (share,) = [line.split("|")[2] for line in card.splitlines() if line.startswith(f"| {index} |")]
        assert float(share) == pytest.approx(100 * planned, abs=0.1)


def test_the_card_has_the_licence_of_the_source_s_card(small_run, save_model):
    folder = save_model()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    run = small_run(folder)
    card = run.store.read(run.export(run.branch(0.0)[0]), "README.md").decode()
    assert "license: apache-2.0\n" in card.split("---")[1]
    assert "applies: apache-2.0." in card


def test_exports_from_before_licences_were_recorded_are_found_again(small_run):
    """A source without a licence has the same key as before cards had licences."""
    run = small_run()
    (lane,) = run.branch(0.0)
    stage = export_stage(run.inputs(), lane, lane, run.pruning)
    assert set(stage.settings["card"]) == {"source", "dense"}
    assert stage.version == 1


def test_a_second_export_reads_nothing(small_run):
    run = small_run()
    (lane,) = run.branch(0.25)
    first, read = run.export(lane), run.checkpoint.bytes_read
    assert run.export(lane) == first
    assert run.checkpoint.bytes_read == read


def test_equal_weights_with_another_tokenizer_are_exported_with_that_tokenizer(small_run):
    """Weights and configuration, and therefore the identity of the checkpoint, are the same."""
    before = small_run()
    first = before.export(before.branch(0.25)[0])
    (before.folder / "chat_template.jinja").write_text("{{ messages }}")
    after = small_run(before.folder)
    assert after.checkpoint.identity == before.checkpoint.identity
    second = after.export(after.branch(0.25)[0])
    assert "chat_template.jinja" not in first.files
    assert after.store.read(second, "chat_template.jinja") == b"{{ messages }}"


def test_every_kind_of_store_gives_the_same_files(store, small_run, another_store):
    here = small_run(store=store)
    there = small_run(here.folder, another_store())
    first, second = (run.export(run.branch(0.25)[0]) for run in (here, there))
    assert first.content == second.content
    assert first.key == second.key


@pytest.mark.parametrize("written", [1, 4])
def test_an_interrupted_export_resumes_with_the_next_shard_and_ends_in_one_folder(
    store, small_run, another_store, dying_at, written
):
    """There are two tensors outside of the layers, then three layers; every shard is a boundary."""
    run = small_run(store=store)
    (lane,) = run.branch(0.25)
    with dying_at("layerwise.tasks.export.write_tensors", call=written + 1):
        run.export(lane, boundary_layers=1)
    read_before = run.checkpoint.bytes_read
    resumed = run.export(lane, boundary_layers=1)
    groups = run.checkpoint.source_tensors()
    shards = [*([tensor] for tensor in groups[None]), *(groups[layer] for layer in range(3))]
    rest = sum(tensor.entry.nbytes for shard in shards[written:] for tensor in shard)
    assert run.checkpoint.bytes_read - read_before == rest
    undisturbed = small_run(run.folder, another_store())
    assert resumed.content == undisturbed.export(undisturbed.branch(0.25)[0]).content
    folder = store.location(resumed)
    assert {store.location(resumed, name) for name in resumed.files} == {
        f"{folder}/{name}" for name in resumed.files
    }


def test_a_shard_that_was_deleted_is_written_again(small_run):
    """No stage reads an export, so its files are checked whenever it is requested."""
    run = small_run()
    (lane,) = run.branch(0.25)
    exported = run.export(lane)
    shard = Path(run.store.location(exported, "model-00003-of-00006.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    again = rebuild_damaged(run.store, lambda: run.export(lane))
    assert Path(run.store.location(again, shard.name)).read_bytes() == content


def test_a_shard_damaged_between_two_attempts_is_not_committed(small_run, dying_at):
    run = small_run()
    (lane,) = run.branch(0.25)
    with dying_at("layerwise.tasks.export.write_tensors", call=4):
        run.export(lane, boundary_layers=1)
    shard = next(Path(run.store.root).rglob("model-00002-of-00006.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed = run.export(lane, boundary_layers=1)
    assert Path(run.store.location(resumed, shard.name)).read_bytes() == content


@MODES
@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT(), Magnitude()], ids=lambda pruner: pruner.method)
def test_an_export_in_the_pass_of_the_test_is_the_same_and_reads_the_layers_once(
    small_run, another_store, mode, pruner
):
    if mode == "sequential" and isinstance(pruner, SparseGPT):
        pytest.skip("SparseGPT needs the dense calibration")
    run = small_run(pruner=pruner, calibration_mode=mode)
    lanes = run.branch(0.0, 0.25)
    read_before = run.checkpoint.bytes_read
    exported, tested = run.export_and_test(*lanes)
    layers = sum(
        tensor.entry.nbytes for layer in range(3) for tensor in run.checkpoint.layer_tensors(layer).values()
    )
    outer = sum(tensor.entry.nbytes for tensor in run.checkpoint.outer_tensors().values())
    assert run.checkpoint.bytes_read - read_before == layers + 2 * outer
    alone = small_run(run.folder, another_store(), pruner=pruner, calibration_mode=mode)
    uniform, best = alone.branch(0.0, 0.25)
    assert exported.content == alone.export(best, uniform).content
    assert tested.content == alone.evaluate(0.0, 0.25).content


@pytest.mark.parametrize(("of_test", "of_export"), [(0, 4), (1, 0), (2, 1), (2, 3), (1, 4), (2, 5)])
def test_an_export_and_a_test_that_resume_at_different_layers_share_the_rest_of_the_pass(
    small_run, another_store, dying_at, of_test, of_export
):
    """There are two shards before the three layers."""
    run = small_run()
    uniform, best = run.branch(0.0, 0.25)
    if of_test:
        with dying_at("layerwise.tasks.lanes.lane_group.LaneGroup._score", call=3 * of_test + 1):
            run.evaluate(0.0, 0.25, boundary_layers=1)
    if of_export:
        with dying_at("layerwise.tasks.export.write_tensors", call=of_export + 1):
            run.export(best, uniform, boundary_layers=1)
    exported, tested = run.export_and_test(uniform, best)
    alone = small_run(run.folder, another_store())
    uniform, best = alone.branch(0.0, 0.25)
    assert exported.content == alone.export(best, uniform).content
    assert tested.content == alone.evaluate(0.0, 0.25).content


@pytest.mark.parametrize("call", [1, 3, 4, 5])
def test_an_export_that_fails_in_the_pass_of_the_test_is_raised_as_such_and_both_resume(
    small_run, another_store, dying_at, call
):
    run = small_run()
    uniform, best = run.branch(0.0, 0.25)
    with dying_at("layerwise.tasks.export.write_tensors", call=call):
        run.export_and_test(uniform, best, boundary_layers=1)
    exported, tested = run.export_and_test(uniform, best)
    alone = small_run(run.folder, another_store())
    uniform, best = alone.branch(0.0, 0.25)
    assert exported.content == alone.export(best, uniform).content
    assert tested.content == alone.evaluate(0.0, 0.25).content


@pytest.mark.parametrize("first", ["export", "test"])
def test_another_process_that_finishes_one_of_both_ends_only_that_one(
    small_run, monkeypatch, computed_layers, first
):
    run = small_run()
    uniform, best = run.branch(0.0, 0.25)
    begun, done, read = [], [], Checkpoint.layers

    def with_another_process(checkpoint, start=0, *device):
        for index, layer in enumerate(read(checkpoint, start, *device), start):
            if index == 1 and not begun:
                begun.append(True)
                done.append(run.export(best, uniform) if first == "export" else run.evaluate(0.0, 0.25))
            yield layer

    monkeypatch.setattr(Checkpoint, "layers", with_another_process)
    both = run.export_and_test(uniform, best, boundary_layers=1)
    assert done[0] in both
    assert computed_layers.count(2) == 3  # capture, lanes, and one test
