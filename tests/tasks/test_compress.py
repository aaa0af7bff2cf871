"""Compress: the exported checkpoint without its zeros, restored bit for bit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.storage.stage import Stage
from layerwise.storage.tensors import read_tensors, write_tensors
from layerwise.tasks.compress import compress, compress_stage
from layerwise.tasks.compressed.checkpoint import load, unpack_checkpoint
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.pages.model_card import ModelCard
from layerwise.tasks.pages.model_card_data import results_on_test
from layerwise.tasks.results.evaluation import read_test
from layerwise.tasks.running.execution import Execution

GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
QWEN2 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 97}
QWEN2_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CARD = ModelCard("tiny/llama", None, "wanda", None, "atp", (0.25, 0.5, 0.75), 0.5)
WIDE = {"hidden_size": 64, "intermediate_size": 128}

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


@pytest.fixture(params=["LLaMA", "tied, bfloat16", "GPT-2", "GPT-2 without its head", "biases, float16"])
def run(request, llama, small_run):
    """Return a run with each source."""
    match request.param:
        case "LLaMA":
            return small_run()
        case "tied, bfloat16":
            return small_run(llama(num_hidden_layers=3, tie_word_embeddings=True).to(torch.bfloat16))
        case "GPT-2":
            return small_run(GPT2LMHeadModel(GPT2Config(**GPT2)))
        case "GPT-2 without its head":  # its tensors are h.0..., not transformer.h.0...
            return small_run(GPT2Model(GPT2Config(**GPT2)))
        case "biases, float16":
            return small_run(Qwen2ForCausalLM(Qwen2Config(**QWEN2, **QWEN2_HEADS)).to(torch.float16))


def export_of(run, beta=0.25):
    return run.export(run.branch(beta)[0])


def compress_export(run, exported, card=CARD, **execution):
    return compress.fn(run.store, exported, card, Execution(**execution))


def folder_of(run, artifact):
    return Path(run.store.location(artifact))


def both_folders(run, beta=0.25):
    exported = export_of(run, beta)
    return folder_of(run, exported), folder_of(run, compress_export(run, exported))


def tensors_of(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(weights, expected):
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        assert (weight.dtype, weight.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(weight.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_the_unpacked_checkpoint_equals_the_export_bit_for_bit(run, tmp_path):
    dense, packed = both_folders(run)
    unpack_checkpoint(packed, tmp_path / "unpacked")
    assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(dense))
    names = {file.name for file in dense.iterdir()} - {"README.md"}
    assert {file.name for file in (tmp_path / "unpacked").iterdir()} == names
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "unpacked" / index).read_text()) == json.loads((dense / index).read_text())
    for name in names - {index, *(file.name for file in dense.glob("*.safetensors"))}:
        assert (tmp_path / "unpacked" / name).read_bytes() == (dense / name).read_bytes()


def test_the_loaded_model_equals_the_export_loaded_by_transformers(run):
    dense, packed = both_folders(run)
    model, expected = load(packed), AutoModelForCausalLM.from_pretrained(dense)
    assert type(model) is type(expected)
    assert model.dtype == expected.dtype
    assert not model.training
    assert_same_bits(model.state_dict(), expected.state_dict())
    input_ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)
    tokens = [
        AutoTokenizer.from_pretrained(folder)("hello big world")["input_ids"] for folder in (packed, dense)
    ]
    assert tokens[0] == tokens[1]


def test_the_loaded_model_has_the_generation_settings_of_its_folder(small_run, llama):
    model = llama(num_hidden_layers=3)
    model.generation_config.max_new_tokens = 3
    _, packed = both_folders(small_run(model))
    assert load(packed).generate(torch.arange(5)[None], do_sample=False).shape == (1, 8)


def test_the_code_in_compressed_md_reads_the_weights_without_this_package(run):
    dense, packed = both_folders(run)
    (code,) = re.findall(r"```python\n(.*?)```", (packed / "COMPRESSED.md").read_text(), re.DOTALL)
    assert not re.search(r"(import|from) (tasks|layerwise|storage|flows)", code)
    names = {}
    exec(code, names)
    assert_same_bits(names["read_weights"](packed), tensors_of(dense))


def test_exactly_the_pruned_linears_are_stored_as_masks_and_values(small_run):
    run = small_run()
    dense, packed = both_folders(run)
    description = json.loads((packed / "compressed.json").read_text())
    report = json.loads((dense / "sparsity.json").read_text())
    pruned = {f"model.layers.{row['layer']}.{row['linear']}.weight": row for row in report["linears"]}
    assert set(description["tensors"]) == set(pruned)
    stored, source = tensors_of(packed), tensors_of(dense)
    for name, row in pruned.items():
        rows, columns = source[name].shape
        described = description["tensors"][name]
        assert (described["shape"], described["dtype"]) == ([rows, columns], "float32")
        assert described["layout"] == "bitmask"
        assert {f"{name}.mask", f"{name}.values"} <= set(load_file(packed / described["file"]))
        assert stored[f"{name}.mask"].shape == (rows, columns // 8)
        assert stored[f"{name}.values"].numel() == row["weights"] - row["zeros"]
        assert name not in stored
    unchanged = set(source) - set(pruned)
    assert unchanged == {name for name in stored if not name.endswith((".mask", ".values"))}


def test_two_of_four_is_stored_in_the_layout_of_torch_s_sparse_tensors(small_run, llama, tmp_path):
    model = llama(num_hidden_layers=3, **WIDE).to(torch.bfloat16)
    run = small_run(model, pattern="2:4")
    dense, packed = both_folders(run, beta=0.0)
    description = json.loads((packed / "compressed.json").read_text())
    assert len(description["tensors"]) == 3 * 7
    assert {sparse["layout"] for sparse in description["tensors"].values()} == {"semi_structured"}
    stored = tensors_of(packed)
    name = "model.layers.1.mlp.down_proj.weight"
    assert stored[f"{name}.values"].shape == (64, 64)
    assert stored[f"{name}.metadata"].shape == (64, 8)
    unpack_checkpoint(packed, tmp_path / "unpacked")
    assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(dense))


def test_one_of_four_is_smaller_as_a_bitmask(small_run, llama):
    model = llama(num_hidden_layers=3, **WIDE).to(torch.bfloat16)
    _, packed = both_folders(small_run(model, pattern="1:4", target=0.75), beta=0.0)
    description = json.loads((packed / "compressed.json").read_text())
    assert {sparse["layout"] for sparse in description["tensors"].values()} == {"bitmask"}


def test_a_linear_that_would_not_become_smaller_stays_dense(small_run, llama):
    """With fewer than 1/16 zeros, the mask of a 16-bit weight is larger than its zeros."""
    run = small_run(llama(num_hidden_layers=3).to(torch.bfloat16), exclude="down_proj", target=0.06)
    dense, packed = both_folders(run, beta=0.0)
    assert json.loads((packed / "compressed.json").read_text())["tensors"] == {}
    assert_same_bits(tensors_of(packed), tensors_of(dense))


def test_zeros_of_weights_that_were_not_pruned_are_kept(small_run, llama):
    """An embedding may have rows of zeros for unused tokens; it is looked up in, not multiplied with."""
    run = small_run(llama(num_hidden_layers=3), exclude="down_proj")
    dense = export_of(run, 0.0)
    sparse = {"model.embed_tokens.weight", *(f"model.layers.{n}.mlp.down_proj.weight" for n in range(3))}

    def with_zeros(draft):
        for name in dense.files:
            if name.endswith(".safetensors"):
                tensors = read_tensors(run.store, dense, name)
                for key in sparse & tensors.keys():
                    tensors[key][:, :24] = 0
                write_tensors(draft, name, tensors)
            else:
                draft.write(name, run.store.read(dense, name))

    exported = run.store.get_or_build(Stage("export", 1, "with zeros"), with_zeros)
    stored = tensors_of(folder_of(run, compress_export(run, exported)))
    assert sparse <= set(stored)
    assert "model.layers.0.mlp.up_proj.weight" not in stored


def test_with_70_percent_zeros_linears_in_bfloat16_shrink_to_37_percent(small_run, llama):
    """30 % of the values remain, plus one bit per 16-bit weight; the embeddings are small here."""
    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3}
    run = small_run(llama(**size).to(torch.bfloat16), target=0.7)
    exported = export_of(run, 0.05)
    facts = compress_export(run, exported).facts
    assert facts["ratio of linears"] == pytest.approx(0.3625, abs=1e-4)
    assert facts["ratio"] <= 0.42


def test_the_reported_sizes_match_the_tensors_in_the_files(small_run, llama):
    run = small_run(llama(num_hidden_layers=3, hidden_size=64))
    exported = export_of(run)
    artifact = compress_export(run, exported)
    dense, packed = (tensors_of(folder_of(run, of)) for of in (exported, artifact))
    bytes_of = {
        name: sum(t.nbytes for t in of.values()) for name, of in (("dense", dense), ("packed", packed))
    }
    linears = sum(weight.nbytes for name, weight in dense.items() if "_proj" in name)
    packed_linears = sum(weight.nbytes for name, weight in packed.items() if "_proj" in name)
    assert artifact.facts == {
        "dense bytes": bytes_of["dense"],
        "compressed bytes": bytes_of["packed"],
        "ratio": bytes_of["packed"] / bytes_of["dense"],
        "dense bytes of linears": linears,
        "compressed bytes of linears": packed_linears,
        "ratio of linears": packed_linears / linears,
    }
    assert json.loads(run.store.read(artifact, "compressed.json"))["sizes"] == artifact.facts
    files = [sum(f.size for name, f in of.files.items() if name.endswith("s")) for of in (exported, artifact)]
    assert files[1] < files[0]


def test_transformers_refuses_the_folder_instead_of_initialising_weights(small_run):
    _, packed = both_folders(small_run())
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_search_refuses_the_folder_and_says_what_to_do(small_run):
    run = small_run()
    _, packed = both_folders(run)
    with pytest.raises(ValueError, match="unpack_checkpoint"):
        import_checkpoint(run.store, str(packed))


def test_config_json_has_no_sparsity_config(small_run):
    """A sparsity_config breaks current vLLM."""
    for folder in both_folders(small_run()):
        for file in folder.glob("*.json"):
            assert "sparsity_config" not in file.read_text()


def test_the_card_also_has_the_test_results(small_run):
    run = small_run()
    exported, tested = export_of(run), run.evaluate(0.0, 0.25)
    rows = results_on_test(read_test(run.store, tested), run.windows["test"])
    card = run.store.read(compress_export(run, exported, replace(CARD, results=rows)), "README.md").decode()
    for name in ("dense", "uniform", "best"):
        assert f"| test text | 2 x 12 | {tested.facts[name]:.2f} |" in card
    assert "from layerwise.tasks.compressed.checkpoint import load" in card


def test_a_second_call_reuses_the_artifact_and_another_card_gives_another(small_run):
    run = small_run()
    exported = export_of(run)
    first = compress_export(run, exported)
    run.store.built.clear()
    assert compress_export(run, exported) == first
    assert run.store.built == set()
    assert compress_export(run, exported, replace(CARD, allocator="owl")).key != first.key


@pytest.mark.parametrize("written", [1, 5])
def test_an_interrupted_compression_resumes_with_the_next_shard_and_ends_in_one_folder(
    store, small_run, dying_at, written
):
    run = small_run(store=store)
    exported = export_of(run)
    with dying_at("layerwise.tasks.compress.write_tensors", call=written + 1):
        compress_export(run, exported, boundary_layers=1)
    assert store.resume_point(compress_stage(exported.key, CARD)).step == written
    resumed = compress_export(run, exported, boundary_layers=1)
    folder = store.location(resumed)
    assert {store.location(resumed, name) for name in resumed.files} == {
        f"{folder}/{name}" for name in resumed.files
    }


def test_an_interrupted_compression_gives_the_files_of_an_undisturbed_one(small_run, another_store, dying_at):
    run = small_run()
    exported = export_of(run)
    with dying_at("layerwise.tasks.compress.write_tensors", call=3):
        compress_export(run, exported, boundary_layers=1)
    resumed = compress_export(run, exported, boundary_layers=1)
    undisturbed = small_run(run.folder, another_store())
    assert resumed.content == compress_export(undisturbed, export_of(undisturbed)).content


def test_a_shard_damaged_between_two_attempts_is_not_committed(small_run, dying_at):
    run = small_run()
    exported = export_of(run)
    with dying_at("layerwise.tasks.compress.write_tensors", call=4):
        compress_export(run, exported, boundary_layers=1)
    shard = next(Path(run.store.root).rglob("compressed-00002-of-00006.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed = compress_export(run, exported, boundary_layers=1)
    assert Path(run.store.location(resumed, shard.name)).read_bytes() == content


def test_a_shard_that_was_deleted_is_written_again(small_run):
    """No stage reads a compressed checkpoint, so its files are checked whenever it is requested."""
    run = small_run()
    exported = export_of(run)
    artifact = compress_export(run, exported)
    shard = Path(run.store.location(artifact, "compressed-00003-of-00006.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    again = rebuild_damaged(run.store, lambda: compress_export(run, exported))
    assert Path(run.store.location(again, shard.name)).read_bytes() == content
