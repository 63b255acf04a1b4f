#!/bin/bash
# Everything that needs a CUDA device, in under 10 minutes: the tests marked gpu, then the benchmark at growing batches.
#   bench/gpu.sh                writes gpu-tests.txt and gpu-<format>-<rows>.{json,txt} to bench/results
#   OUT=folder bench/gpu.sh     writes them there
# A part that runs out of time or fails is named at the end, and the exit code is then 1; the others are kept.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
deadline=$((SECONDS + 585))
failed=()
settings=$(mktemp -d)
trap 'rm -rf "$settings"' EXIT
mkdir -p "$out"

# part NAME SECONDS COMMAND...: runs it for so long at most, and not past the deadline, with its output in NAME.txt
part() {
  local name=$1 limit=$2 left=$((deadline - SECONDS))
  shift 2
  if ((left < 10)); then
    failed+=("$name (no time left)")
    return
  fi
  echo "== $name"
  PYTHONUNBUFFERED=1 timeout "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  ((code == 0)) || failed+=("$name (exit code $code)")
}

python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch finds no CUDA device"; exit 1; }
formats=(fp16)
python3 -c 'import sys, torch; sys.exit(torch.cuda.get_device_capability() < (8, 0))' && formats=(bf16 fp16)

part gpu-tests 180 python3 -m pytest -m gpu
for format in "${formats[@]}"; do
  printf '{"model": {"vocab_size": 32000}, "train": {"train_steps": 10000, "precision": "%s"}}' "$format" \
    >"$settings/$format.json"
  for rows in 64 8 256 32 128; do # the most telling first
    name=gpu-$format-$rows
    part "$name" 60 python3 -m moelet bench "$settings/$format.json" --batch-size "$rows" --peers-allocator default \
      --variants dense-active,hf-qwen3moe-grouped_mm --json "$out/$name.json"
  done
done

for name in "${failed[@]}"; do echo "not done: $name"; done
exit $((${#failed[@]} > 0))
