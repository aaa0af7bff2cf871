"""Model in a folder: code and pickles in it are never run, and missing weights are refused."""

import json
import os
import pickle
import runpy

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from layerwise.tasks.models.model_in_folder import model_in_folder
from layerwise.tasks.sources.folder import list_folder

TOKENS = torch.tensor([[5, 1, 7, 7, 2]])


class Bomb:
    """Create a folder when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """Return the path that exists if code from the folder was run."""
    return tmp_path / "it ran"


def opened(folder, dtype=torch.float32):
    return model_in_folder(list_folder(LocalFileSystem(), str(folder), str(folder)), dtype)


def change_config(folder, **changes):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))


def bring_code(folder, mark):
    """Put code next to the weights for every class that transformers might load."""
    (folder / "own.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    )
    change_config(folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_equals_the_one_that_transformers_opens(save_model, family):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    folder = save_model(gpt2) if family == "gpt2" else save_model()
    expected = AutoModelForCausalLM.from_pretrained(folder)
    expected.generation_config.max_new_tokens = 3
    expected.generation_config.save_pretrained(folder)
    model = opened(folder)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, expected.eval()(TOKENS).logits)
    assert model.generate(TOKENS).shape == (1, 8)
    assert opened(folder, torch.bfloat16).dtype == torch.bfloat16


def test_a_pickle_is_refused_without_opening_it(save_model, mark):
    folder = save_model()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickle files .* are not read\. Convert them"):
        opened(folder)
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "the bomb must work"


def test_pickles_next_to_the_weights_are_not_opened(save_model, mark):
    folder = save_model()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert opened(folder)(TOKENS).logits.isfinite().all()
    assert not mark.exists()


def test_code_that_comes_with_a_model_is_never_run(save_model, mark):
    folder = save_model()
    bring_code(folder, mark)
    assert opened(folder)(TOKENS).logits.isfinite().all()  # transformers' own class for the model type
    change_config(folder, model_type="my_own")
    with pytest.raises(ValueError, match=r"'my_own'.*own code \(auto_map\), which is never run"):
        opened(folder)
    assert not mark.exists()
    runpy.run_path(str(folder / "own.py"))
    assert mark.exists(), "the code must work"


def test_missing_weights_are_refused(save_model):
    folder = save_model()
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the .*model\.layers\.0\.mlp\.up_proj\.weight"):
        opened(folder)


def test_an_index_that_refers_to_files_outside_of_the_folder_is_refused(save_model, tmp_path):
    folder = save_model()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    place = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    with pytest.raises(ValueError, match=r"lacks 1 of the 1 shards"):
        opened(folder)


@pytest.mark.parametrize("content", ["no JSON", "[]", "[" * 100_000, '{"watermarking_config": {"x": 1}}'])
def test_invalid_generation_settings_are_refused_in_one_line(save_model, content):
    folder = save_model()
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"generation_config\.json of .* cannot be used \(.*remove it"
    ) as refused:
        opened(folder)
    assert "\n" not in str(refused.value)
