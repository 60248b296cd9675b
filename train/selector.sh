#!/usr/bin/env bash
# Train, calibrate and test the selector in selectors/reference-moe. Run from the repository's root; the folder must not exist.
set -euo pipefail
for step in collect train calibrate evaluate coverage; do
  lynx-learn "$step" --config "train/selector/$step.yaml"
done
