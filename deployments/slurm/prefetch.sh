#!/bin/bash
# On a login node: download the model and the texts of a search, and check them. The model is used in place, without a copy.
set -eu

MODEL=${1:-meta-llama/Llama-2-7b-hf}                     # a gated model needs HF_TOKEN
SHARED=${SHARED:-/shared}                                # a folder that all nodes reach
TASKS=${TASKS:-}                                         # tasks for layerwise zero-shot, such as arc_easy,piqa; none if empty

hf download "$MODEL" --exclude 'original/*' --exclude '*.bin' --local-dir "$SHARED/model"
hf download allenai/c4 en/c4-train.00000-of-01024.json.gz --repo-type dataset --local-dir "$SHARED/c4"
hf download Salesforce/wikitext --include 'wikitext-2-raw-v1/*' --repo-type dataset --local-dir "$SHARED/wikitext"

# lm-eval's dummy model answers one question of each task, after all of their data is in HF_HOME.
if [ -n "$TASKS" ]; then
    HF_HOME="$SHARED/huggingface" lm_eval run --model dummy --tasks "$TASKS" --limit 1
fi

export HF_HUB_OFFLINE=1
layerwise plan --model "$SHARED/model" --sparsity 0.7 --recover refit --store "${STORE:-$SHARED/runs}" --no-measure \
    --calibration "$SHARED/c4/en/c4-train.00000-of-01024.json.gz" \
    --selection "$SHARED/wikitext/wikitext-2-raw-v1/validation-*.parquet" \
    --test "$SHARED/wikitext/wikitext-2-raw-v1/test-*.parquet"
