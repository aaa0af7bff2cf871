"""The model card of an exported checkpoint."""

from collections.abc import Mapping

from tasks.prune_settings import PruneSettings


def model_card(
    source: str, settings: PruneSettings, beta: float, realised: float, perplexities: Mapping[str, float]
) -> str:
    """README.md of the exported folder: what it is, how it was made, how to load it.

    Args:
        source: the dense model, as the user named it.
        realised: zeros over weights of all pruned linears.
        perplexities: on the selection text, of "dense", "uniform" and "pruned".
    """
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [pruning, sparsity, atp, {settings.pruner.method}]
---

# {source}, {100 * realised:.1f} % sparse

Made from `{source}` by layerwise: one-shot pruning with {settings.pruner.method}, the sparsity rising from
layer to layer by beta = {beta:g} (ATP, [arXiv:2502.14770](https://arxiv.org/abs/2502.14770)). Embeddings,
norms and the head are dense. The licence of the dense model applies.

| | perplexity on the selection text |
|---|---|
| dense | {perplexities["dense"]:.2f} |
| uniform sparsity | {perplexities["uniform"]:.2f} |
| **this model** (beta {beta:g}) | **{perplexities["pruned"]:.2f}** |

`sparsity.json` holds the plan and the realised sparsity of every linear. The zeros are stored as zeros: the
files are as large as those of the dense model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
