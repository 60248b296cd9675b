#!/usr/bin/env bash
# Train, calibrate and test the selector in selectors/reference-moe, or with an argument that of another reference model:
# train/selector.sh reference-moe-50m. Run from the repository's root; the selector's folder must not exist.
set -euo pipefail
model=${1:-}
declare -A own=()
if [ -n "$model" ]; then
  own=(
    [collect]="--model $model --out runs/$model/trace"
    [train]="--trace runs/$model/trace --out selectors/$model"
    [calibrate]="--selector selectors/$model"
    [evaluate]="--selector selectors/$model --trace runs/$model/trace --out runs/$model/report --batches mixed"
    [coverage]="--selector selectors/$model --out runs/$model/coverage"
  )
fi
for step in collect train calibrate evaluate coverage; do
  # shellcheck disable=SC2086  # several words
  lynx-learn "$step" --config "train/selector/$step.yaml" ${own[$step]:-}
done
