#!/usr/bin/env bash
# Everything that one GPU has to say, within ten minutes: eight benchmarks, then training through Trainer, whose log
# lines give tokens_per_second. Where there are two GPUs, what the second one brings, in ten minutes more. Results go to
# training/benchmarks/results or to the folder given.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:-training/benchmarks/results}

for name in loss decode encode train sentences mlm pretrain caption; do
  timeout 120 python -m training.benchmarks "$name" --device cuda --output "$results" || echo "$name: see its table" >&2
done
timeout 150 python -m training.run_clm --preset gpt2 --output_dir runs/gpu --block_size 1024 --bf16 --torch_compile \
  --config_overrides vocab_size=50257,attn_pdrop=0,resid_pdrop=0,embd_pdrop=0 --per_device_train_batch_size 64 \
  --max_steps 60 --logging_steps 10 --eval_strategy no --save_strategy no 2>&1 | tee "$results/trainer-gpt2-cuda.log"
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
  timeout 600 python -m training.benchmarks.scaling --device cuda --batch_size 16 --length 1024 --output "$results"
fi
