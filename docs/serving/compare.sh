#!/usr/bin/env bash
# What skipping saves and changes on this machine: starts a server by start.sh and asks it with skipping on and off in turns.
#   docs/serving/compare.sh MODEL SELECTOR BUDGET TOKENS [vLLM options]
# The figures are JSON on standard output, with the seconds that the server took to start; its log is compare.log.
set -euo pipefail
model=$1 tokens=$4 port=${PORT:-8000}
LYNX_SELECTOR=$2 LYNX_BUDGET=$3 LYNX_AUDIT_EVERY=0 "$(dirname "$0")/start.sh" --model "$model" "${@:5}" >compare.log 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true' EXIT
until curl -sf "http://127.0.0.1:$port/health"; do
    kill -0 $server 2>/dev/null || { tail -n 5 compare.log >&2; exit 1; }
    sleep 1
done
echo "{\"model\": \"$model\", \"seconds_to_start\": $SECONDS}"
"${PYTHON:-python}" -m lynx_learn.cli bench --url "http://127.0.0.1:$port" --prompts "${PROMPTS:-64}" --concurrency 16 --tokens "$tokens"
