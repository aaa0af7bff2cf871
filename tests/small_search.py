"""Search that is small enough to run fifty times: a random LLaMA in a GGUF file, and a text in its alphabet."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TOKENS = ["<unk>", "<s>", "</s>", *ALPHABET, "ab"]
HIDDEN, FEED_FORWARD, HEADS, KEY_VALUE_HEADS = 256, 512, 4, 2


def small_search(folder: Path, layers: int = 12, letters: int = 12000) -> dict[str, Any]:
    """Write a model and a text to ``folder``; return the settings of a search with them, as plain JSON.

    The model is a GGUF file, because importing it into the store leaves a resume point after every layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, text = folder / "small.gguf", folder / "text.txt"
    _write_model(model, layers)
    text.write_text("".join(random.Random(0).choices(ALPHABET, k=letters)))
    return {
        "model": str(model),
        "sparsity": 0.5,
        "betas": [0.02, 0.05],
        "calibration": str(text),
        "selection": str(text),
        "calibration_windows": 8,
        "selection_windows": 6,
        "test_windows": 6,
        "seqlen": 128,
        "retain": "sampled",
    }


def _write_model(path: Path, layers: int) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b"])
    generator = np.random.default_rng(0)
    for name, shape in _shapes(layers).items():
        if len(shape) == 1:
            weight = np.ones(shape, dtype=np.float32)
        else:
            weight = 0.05 * generator.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name in the file."""
    narrow = HIDDEN * KEY_VALUE_HEADS // HEADS
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (narrow, HIDDEN),
        "attn_v": (narrow, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    outer = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "output": (len(TOKENS), HIDDEN)}
    return outer | {f"blk.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
