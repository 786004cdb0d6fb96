#!/usr/bin/env bash
# All measurements that need a GPU, in one command, limited to eight minutes.
#
#     benchmarks/gpu.sh [--out DIR] [--python PYTHON] [--peer-env DIR] [--scratch DIR] [--smoke] [--vllm]
#
# The models are Llamas of 1B and 8B parameters with random weights, made here; nothing is downloaded. Every section has
# a time limit, and a section that fails does not end the run. The folder of results is updated after each section:
# results.md is the table for docs/performance.md, results.json holds every figure, NAME.log what a section printed.
# Exit status: 1 if a section failed or had no time left.
#
#   --out       folder of results (gpu-benchmark)
#   --python    Python with rlhf_cli and TRL (python)
#   --peer-env  environment with TRL 1.12.0 for PPO, see benchmarks/ppo_vs_trl.py; without one, ours is measured alone
#   --seconds   limit of the whole run (465: the rest of eight minutes is for the end of the last section)
#   --scratch   folder for the models, 25 GB (/dev/shm if it has the space, else the folder of results)
#   --smoke     the sections up to `sft` on tiny shapes, on any machine, in about a minute
#   --vllm      only vLLM, with the Python of its environment: the interface that we rely on, rollouts on the policy's
#               GPU, and, with two GPUs, rollouts on a server, in a sharded run, and with one engine of both GPUs; what
#               the machine lacks is skipped
set -uo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
out=gpu-benchmark python=python peer=none scratch="" smoke=0 vllm=0 total=""
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="$2"; shift 2 ;;
        --python) python="$2"; shift 2 ;;
        --peer-env) peer="$2"; shift 2 ;;
        --scratch) scratch="$2"; shift 2 ;;
        --seconds) total="$2"; shift 2 ;;
        --smoke) smoke=1; shift ;;
        --vllm) vllm=1; shift ;;
        -h | --help) sed -n '2,/^set /{/^#/p}' "$0"; exit 0 ;;
        *) echo "unknown option: $1" >&2; exit 2 ;;
    esac
done

if [ -z "$total" ]; then total=$([ "$smoke" = 1 ] && echo 4650 || echo 465); fi
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.jsonl "$out"/*.log "$out"/*.md
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -z "$scratch" ]; then
    free_gb=$(df --output=avail --block-size=1G /dev/shm 2>/dev/null | tail -n 1)
    if [ "$smoke" = 0 ] && [ "${free_gb:-0}" -ge 40 ]; then scratch=/dev/shm; else scratch="$out"; fi
fi
models="$(mktemp -d "$scratch/rlhf-gpu-XXXXXX")"
trap 'rm -rf "$models"' EXIT

failed=0
section() { # name, limit in seconds, command
    local name="$1" limit="$2" began="$SECONDS" status
    shift 2
    if [ "$smoke" = 1 ]; then limit=$((10 * limit)); fi # a busy machine without a GPU is no failure
    local left=$((total - SECONDS))
    if [ "$limit" -gt "$left" ]; then limit="$left"; fi
    if [ "$limit" -lt 5 ]; then
        status=out-of-time
    else
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
        status=$?
    fi
    if [ "$status" != 0 ]; then failed=1; fi
    echo "$name: $((SECONDS - began)) s, status $status" >&2
    printf '{"name": "%s", "status": "%s", "seconds": %d, "limit": %d}\n' \
        "$name" "$status" $((SECONDS - began)) "$limit" >>"$out/sections.jsonl"
    "$python" "$here/gpu_report.py" collect "$out" >&2
}
skip() { # name, reason
    printf '{"name": "%s", "status": "skipped", "reason": "%s"}\n' "$1" "$2" >>"$out/sections.jsonl"
    "$python" "$here/gpu_report.py" collect "$out" >&2
}

if [ "$smoke" = 1 ]; then
    shape=tiny dtype=float32
    ppo=(--prompt-tokens 16 --response-tokens 8 --episodes 4 --micro-batch 2 --epochs 1 --steps 2)
    train_rm=(--adapter lora --steps 2 --batch 2 --micro-batch 1 --tokens 8 8 --completions 3 --learning-rate 1e-2)
    sft=(--adapter lora --steps 2 --batch 4 --micro-batch 2 --tokens 8 8 --learning-rate 1e-1)
    decode=(--prompts 2 --completions 2 --prompt-length 8 --max-new-tokens 8)
    generate=(--batch 2 --mean 4 --pairs 1)
    vllm_sizes=(--completions 8 --tokens 8)
else
    shape=1b dtype=bfloat16
    ppo=(--prompt-tokens 256 --response-tokens 128 --episodes 64 --micro-batch 16 --steps 2)
    ppo_large=(--prompt-tokens 256 --response-tokens 128 --episodes 32 --micro-batch 8)
    train_rm=(--adapter lora --steps 8 --batch 8 --micro-batch 4 --tokens 256 256 --max-length 1024)
    sft=(--adapter lora --steps 8 --batch 32 --micro-batch 16 --tokens 256 256 --max-length 1024)
    decode=(--prompts 16 --completions 8 --prompt-length 512 --max-new-tokens 256)
    generate=(--batch 64 --mean 128 --pairs 2)
    vllm_sizes=(--completions 256 --tokens 256)
fi
once=(--pairs 1 --precision "$dtype" --threads "$([ "$smoke" = 1 ] && echo 1 || nproc)" --scratch "$models" --train-only)

section environment 30 "$python" "$here/gpu_report.py" environment "$out/environment.json"
section models-1b 60 "$python" "$here/comparison.py" model "$models/1b" --shape "$shape" --dtype "$dtype" --classifier
if [ "$vllm" = 1 ]; then
    # Random weights: their probabilities are flat, so the drift is that of rounding alone.
    check=("$here/vllm_check.py" --model "$models/1b" "${vllm_sizes[@]}")
    for part in vllm vllm-server vllm-sharded vllm-parallel; do
        if lacks="$("$python" "${check[@]}" --lacks "$part")"; [ -n "$lacks" ]; then
            skip "$part" "$lacks"
        else
            section "$part" 150 "$python" "${check[@]}" --part "$part" --json "$out/$part.json"
        fi
    done
    cat "$out/results.md"
    exit "$failed"
fi
if [ -f "$here/generate.py" ]; then
    section decode 60 "$python" "$here/generate.py" --model "$models/1b" --dtype "$dtype" "${decode[@]}" "${generate[@]}"
else
    skip decode "benchmarks/generate.py is absent"
fi
if "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"; then
    section decode-vllm 90 "$python" "$here/gpu_report.py" vllm "$models/1b" "$out/decode-vllm.json" "${decode[@]}"
else
    skip decode-vllm "vLLM is not installed"
fi
section ppo-1b 100 "$python" "$here/ppo_vs_trl.py" --model "$models/1b" --reward-model "$models/1b-classifier" \
    --name "random Llama $shape" --peer-env "$peer" --peer-dtype "$dtype" --json "$out/ppo-1b.json" "${once[@]}" "${ppo[@]}"
section train-rm 60 "$python" "$here/train_rm_vs_trl.py" --model "$models/1b" --name "random Llama $shape" --random \
    --json "$out/train-rm.json" "${once[@]}" "${train_rm[@]}"
section sft 60 "$python" "$here/sft_vs_trl.py" --model "$models/1b" --name "random Llama $shape" --random \
    --json "$out/sft.json" "${once[@]}" "${sft[@]}"
if [ "$smoke" = 0 ]; then
    section models-8b 90 "$python" "$here/comparison.py" model "$models/8b" --shape 8b --dtype "$dtype"
    section ppo-8b 100 "$python" "$here/ppo_vs_trl.py" --model "$models/8b" --reward-model "$models/1b-classifier" \
        --name "random Llama 8b, reward model 1b" --peer-env none --json "$out/ppo-8b.json" "${once[@]}" "${ppo_large[@]}"
    # The kernels come last and take the time that is left.
    left=$((total - SECONDS))
    section kernels "$left" "$python" "$here/attention.py" --out "$out/kernels" \
        --limit $((left > 30 ? left - 20 : 10))
fi

cat "$out/results.md"
exit "$failed"
