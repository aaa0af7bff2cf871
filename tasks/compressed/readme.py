"""COMPRESSED.md: the layout of a compressed checkpoint, for whoever finds the folder without this package."""

LAYOUT_FILE = "COMPRESSED.md"

LAYOUT_TEXT = """# A checkpoint without its zeros

Written by layerwise; format `layerwise-compressed`, version 1. `config.json` and the tokenizer are those of the model.
The tensors are in `compressed-*.safetensors`, which `compressed.json` lists under `files`. Most are stored as they are.
For a pruned weight `X` that is smaller without its zeros two tensors stand, and `compressed.json` has an entry for it
under `tensors`: its `shape` (rows, columns), its `dtype`, the `file` that both are in, and the `layout`.

`bitmask`:

- `X.mask`, uint8, shape (rows, ceil(columns / 8)): bit `k % 8` (bit 0 is the lowest) of byte `k // 8` of a row is 1 if
  weight `k` of that row is stored; the bits beyond the last column are 0.
- `X.values`, dtype of X, one-dimensional: the stored weights, row by row.

`semi_structured`, for float16 and bfloat16 weights of which at most two of every four in a row are stored ("2:4"):

- `X.values`, dtype of X, shape (rows, columns / 2): the two stored weights of every four.
- `X.metadata`, int16, shape (rows, columns / 16): which two they are, four bits for every four weights, in the order in
  which the kernels of CUTLASS read them.

These are the `packed` and `meta` of torch's tensors for 2:4 sparsity: on a GPU for which torch has such kernels,
`SparseSemiStructuredTensorCUTLASS(shape, values, metadata, None, None, None)` can take the place of the weight.

A weight is stored if its bits are not all zero. -0.0 is, so that all weights come back bit for bit.

All weights with their zeros, as a state dict:

```python
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.sparse import SparseSemiStructuredTensorCUTLASS


def read_weights(folder):
    description = json.loads((Path(folder) / "compressed.json").read_text())
    weights = {}
    for file in description["files"]:
        if not re.fullmatch(r"compressed-[0-9]+-of-[0-9]+\\.safetensors", file):
            raise ValueError(f"{file!r} is not a file of this folder")
        weights |= load_file(Path(folder) / file)
    for name, sparse in description["tensors"].items():
        shape, values = torch.Size(sparse["shape"]), weights.pop(f"{name}.values")
        if sparse["layout"] == "bitmask":
            bits = weights.pop(f"{name}.mask")[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
            stored = bits.flatten(1)[:, : shape[1]].bool()
            weights[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(stored, values)
        else:
            parts = values, weights.pop(f"{name}.metadata"), None, None, None
            weights[name] = SparseSemiStructuredTensorCUTLASS(shape, *parts).to_dense()
    return weights
```
"""
