#!/bin/bash
# RL on the GPUs of one node: some of them serve, the others train.
#
#   MODEL=Qwen/Qwen3-4B-Instruct-2507 SERVE_GPUS=0,1,2,3 TRAIN_GPUS=4,5,6,7 \
#     launch/rl_node.sh --config=configs/rl_qwen3_4b.py [--config.OPTION=VALUE ...]
#
# One server per GPU of SERVE_GPUS, at ports from FIRST_PORT (8001) on, for rollouts of up to MAX_LEN
# (8192) tokens, which the run's seq_len may not exceed, with SERVE_FLAGS beside what is below; its
# log is server-PORT.log. Servers and trainer end together; SIGTERM saves.

set -euo pipefail

if [ -z "${MODEL:-}" ] || [ "$#" -eq 0 ]; then
  echo "usage: MODEL=FOLDER_OR_NAME $0 --config=FILE.py [--config.OPTION=VALUE ...]" >&2
  exit 2
fi

servers=() urls=()
trap 'kill "${servers[@]}" 2>/dev/null || true' EXIT
IFS=, read -ra gpus <<<"${SERVE_GPUS:-0,1,2,3}"
for gpu in "${gpus[@]}"; do
  port=$((${FIRST_PORT:-8001} + ${#urls[@]}))
  # shellcheck disable=SC2086 # several flags
  CUDA_VISIBLE_DEVICES=$gpu python -m jaxrl.serve --config=configs/serve.py \
    --config.model="$MODEL" --config.server.port=$port \
    --config.engine.max_len="${MAX_LEN:-8192}" ${SERVE_FLAGS:-} >"server-$port.log" 2>&1 &
  servers+=($!)
  urls+=("http://127.0.0.1:$port")
done

CUDA_VISIBLE_DEVICES=${TRAIN_GPUS:-4,5,6,7} python -m jaxrl.rl "$@" --config.model="$MODEL" \
  --config.rollout.servers="$(IFS=, && echo "${urls[*]}")" \
  --config.rollout.server_start_s=1800 &
trainer=$!
trap 'kill -TERM "$trainer"' TERM INT
code=0
wait "$trainer" || code=$?
while kill -0 "$trainer" 2>/dev/null; do # a signal ends `wait` before the trainer has saved
  wait "$trainer" && code=0 || code=$?
done
exit "$code"
