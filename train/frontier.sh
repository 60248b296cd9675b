#!/usr/bin/env bash
# Everything behind docs/frontier.md and docs/certificate.md once `train/selector.sh` has run for both reference models: tables of
# both, ablations and other kinds of surrogates and decisions, models with other gates, quantised experts, text of other kinds, long
# decodes, the pages.
# shellcheck disable=SC2086  # several words
set -euo pipefail
cd "$(dirname "$0")/.."
measured="--config train/selector/evaluate.yaml --batches mixed --card false"
larger="--selector selectors/reference-moe-50m --trace runs/reference-moe-50m/trace"
lynx-learn evaluate $measured --batch-sizes 8 --tokens 8000 --out runs/frontier-8
lynx-learn evaluate $measured --batch-sizes 32 64 --tokens 6000 --methods lda layered formula learned --out runs/frontier-32-64
lynx-learn evaluate $measured $larger --batch-sizes 8 32 --tokens 6000 --methods siftmoe layered learned --out runs/frontier-50m-8-32
lynx-learn evaluate $measured $larger --batch-sizes 64 --tokens 6000 --methods siftmoe layered learned --out runs/frontier-50m-64
python train/ablations.py --config train/ablations.yaml
longer='{"tuned three times as long": {"tune_steps": 360}, "tuned at 8, 16 and 32 together": {"tune_batch_sizes": [8, 16, 32]}}'
python train/ablations.py --config train/ablations.yaml --variants "$longer" --out runs/ablations-longer
python train/surrogate_kinds.py --config train/surrogate_kinds.yaml
python train/decision_kinds.py --config train/decision_kinds.yaml
python train/decision_kinds.py --config train/decision_kinds.yaml $larger --out runs/decision-kinds/50m.md --measured_on 4 --learned_from 8
python train/reference_moe.py --config train/top2-moe.yaml
top2="--model runs/top2-moe/model"
lynx-learn collect --config train/selector/collect.yaml $top2 --out runs/top2/trace
lynx-learn train --config train/selector/train.yaml --trace runs/top2/trace --reference false --out runs/top2/selector
lynx-learn evaluate $measured $top2 --trace runs/top2/trace --selector runs/top2/selector --batch-sizes 4 16 --tokens 6000 \
  --methods lynx xshare naee siftmoe exfold gate_sq layered lda formula learned oracle --out runs/top2/report
python train/reference_moe.py --config train/second-moe.yaml
second="--model runs/second-moe/model"
lynx-learn collect --config train/selector/collect.yaml $second --out runs/second/trace
lynx-learn train --config train/selector/train.yaml --trace runs/second/trace --reference false --out runs/second/selector
lynx-learn evaluate $measured $second --trace runs/second/trace --selector runs/second/selector --batch-sizes 16 --tokens 6000 \
  --methods lynx xshare sere siftmoe exfold k1k2 gate_sq gate_max layered lda formula learned oracle --out runs/second/report
python train/quantised.py --config train/quantised.yaml
python train/quantised.py --config train/quantised.yaml --selector selectors/reference-moe-50m --retrain null --out runs/quantised-50m
python train/certificate.py --config train/certificate.yaml
python train/stand_ins.py --config train/stand_ins.yaml
python train/stand_ins.py --config train/stand_ins.yaml $larger --out runs/stand-ins/50m.md --compared 512
large='{"batch_sizes": [64], "length": 512, "tokens": 15000}'
python train/certificate.py --config train/certificate.yaml --base "$large" --out runs/certificate-64
python train/long_decode.py --config train/long_decode.yaml
python train/long_decode.py --config train/long_decode.yaml --length 512 --stretch 1 --groups 4 --out runs/long-decode/long-decode-512.md
python docs/measured_pages.py --config docs/measured-pages.yaml
