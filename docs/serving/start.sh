#!/usr/bin/env bash
# Starts a vLLM server that skips experts, and a Prometheus that watches it where one is installed; both end together.
# Options are vLLM's. From the environment: LYNX_SELECTOR and LYNX_BUDGET; LYNX_AUDIT_EVERY, how many steps from one audited to the
# next; PORT of the server; PROMETHEUS_PORT and PROMETHEUS_DATA, the folder of what it keeps; PYTHON of vLLM's environment.
#   LYNX_SELECTOR=selectors/reference-moe LYNX_BUDGET=0.01 docs/serving/start.sh --model lynx_learn/reference_moe
set -euo pipefail
: "${LYNX_SELECTOR:?set it to the folder or Hub id of a calibrated selector}" "${LYNX_BUDGET:?set it to nats of KL per token}"
export LYNX_SELECTOR LYNX_BUDGET LYNX_AUDIT_EVERY=${LYNX_AUDIT_EVERY:-64}
port=${PORT:-8000} data=${PROMETHEUS_DATA:-prometheus-data}
trap 'trap - EXIT TERM INT; kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
"${PYTHON:-python}" -m vllm.entrypoints.openai.api_server --port "$port" "$@" &
if command -v prometheus >/dev/null; then
    mkdir -p "$data"
    sed "s/localhost:8000/localhost:$port/" "$(dirname "$0")/prometheus.yml" >"$data/prometheus.yml"
    prometheus --config.file="$data/prometheus.yml" --storage.tsdb.path="$data" --log.level=warn \
        --web.listen-address="127.0.0.1:${PROMETHEUS_PORT:-9090}" &
else
    echo "no Prometheus is installed (Debian: apt install prometheus): the server runs without" >&2
fi
wait -n
