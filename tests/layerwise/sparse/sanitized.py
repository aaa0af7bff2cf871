"""Script that runs the kernel on all weights, and ranks scores, under AddressSanitizer: ``python -m ... LIBRARY LEVEL...``."""

import sys
from itertools import product
from pathlib import Path

import torch

from layerwise.sparse.native import SCORES, Kernel, load
from tests.layerwise.sparse.shapes import DTYPES, every_weight

if __name__ == "__main__":
    path, *levels = sys.argv[1:]
    library = load(Path(path))
    for level, dtype in product(levels, DTYPES):
        kernel = Kernel(library, level)
        for weight, _ in every_weight(dtype):
            for tokens in (0, 1, 2, 7, 8):
                kernel.multiply(weight, torch.ones(tokens, weight.shape[1], dtype=dtype))
            kernel.multiply(
                weight, torch.ones(1, weight.shape[1], dtype=dtype), torch.ones(weight.shape[0], dtype=dtype)
            )
            kernel.unpack_rows(weight, 0, torch.empty(weight.shape, dtype=kernel.dense_dtype(dtype)))
    kernel = Kernel(library, "portable")
    for dtype, columns in product(SCORES, (1, 4, 64, 65, 3000)):
        for scores in (torch.randn(5, columns), torch.ones(5, columns), torch.full((5, columns), torch.nan)):
            for counts in ([0], [columns], [columns // 3, columns // 2]):
                kernel.levels_of_rows(scores.to(dtype), counts, [0] * len(counts))
    sys.stdout.write("all done\n")
