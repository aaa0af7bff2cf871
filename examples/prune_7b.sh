#!/usr/bin/env bash
# Prune a 7B model to 70 %, fit the weights that stay, and look at the result. Needs a GPU with 12 GB or more, 90 GB of disk, the
# hub and a token with access to the model (export HF_TOKEN=...). After an interruption, start it again: it continues.
set -euo pipefail

layerwise doctor --store runs --model meta-llama/Llama-2-7b-hf

layerwise search --model meta-llama/Llama-2-7b-hf --sparsity 0.7 --store runs --recover refit --recover-windows 32 \
    --calibration c4 --selection wikitext2 --device cuda

layerwise compress --store runs
layerwise report runs --output report.html # with the sizes of the compressed model
layerwise zero-shot --store runs --documents 500 # needs pip install '.[zeroshot]'; adds the accuracies to the report in the store
