#!/usr/bin/env bash
# Everything behind docs/frontier.md and docs/certificate.md once `train/selector.sh` has run: ablations, the second model,
# quantised experts, text of other kinds, long decodes, the pages.
set -euo pipefail
cd "$(dirname "$0")/.."
python train/ablations.py --config train/ablations.yaml
python train/reference_moe.py --config train/second-moe.yaml
second="--model runs/second-moe/model"
lynx-learn collect --config train/selector/collect.yaml $second --out runs/second/trace
lynx-learn train --config train/selector/train.yaml --trace runs/second/trace --reference false --out runs/second/selector
lynx-learn evaluate --config train/selector/evaluate.yaml $second --trace runs/second/trace --selector runs/second/selector \
  --batch-sizes 16 --batches mixed --tokens 20000 --card false --out runs/second/report
python train/quantised.py --config train/quantised.yaml
python train/quantised.py --config train/quantised.yaml --selector selectors/reference-moe-50m --out runs/quantised-50m
python train/certificate.py --config train/certificate.yaml
python train/stand_ins.py --config train/stand_ins.yaml
python train/stand_ins.py --config train/stand_ins.yaml --trace runs/reference-moe-50m/trace \
  --selector selectors/reference-moe-50m --out runs/stand-ins/50m.md --compared 512
large='{"batch_sizes": [64], "length": 512, "tokens": 15000}'
python train/certificate.py --config train/certificate.yaml --base "$large" --out runs/certificate-64
python train/long_decode.py --config train/long_decode.yaml
python train/long_decode.py --config train/long_decode.yaml --length 512 --stretch 1 --groups 4 --out runs/long-decode/long-decode-512.md
python docs/measured_pages.py --config docs/measured-pages.yaml
