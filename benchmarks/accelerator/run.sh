#!/usr/bin/env bash
# Checks and times what there is on the accelerator at hand, in under nine minutes on one H100. Each part leaves its JSON
# in FOLDER (default: benchmarks/results/accelerator), written row by row, and has a time of its own.
#
#   benchmarks/accelerator/run.sh [FOLDER [--small] [PART ...]]
#
# PARTs: exactness kernels pruning training figure3 (all by default). --small: a size for a processor.
# PYTHON names the interpreter. IMAGES names the file that `python -m benchmarks.accelerator.images FILE` wrote; without
# it, CIFAR-10 comes from TFDS. LIMIT gives each part that many seconds instead of its own. Exit code 1: some part failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-benchmarks/results/accelerator}
shift || true
small=()
if [[ ${1:-} == --small ]]; then small=(--small); shift; fi
[[ $# -gt 0 ]] || set -- exactness kernels pruning training figure3
declare -A limits=([exactness]=105 [kernels]=175 [pruning]=55 [training]=65 [figure3]=138)
export XLA_PYTHON_CLIENT_PREALLOCATE=false      # PyTorch and several processes share the card
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"
code=0
for part in "$@"; do
  if [[ -z ${limits[$part]:-} ]]; then echo "unknown part $part; choose from ${!limits[*]}" >&2; exit 2; fi
  images=()
  if [[ -n ${IMAGES:-} && ( $part == training || $part == figure3 ) ]]; then images=(--images "$IMAGES"); fi
  limit=${LIMIT:-${limits[$part]}}
  began=$SECONDS
  timeout --kill-after=5 "$limit" "${PYTHON:-python3}" -m "benchmarks.accelerator.$part" \
    --output "$folder/$part.json" --seconds $((limit - 15)) "${small[@]}" "${images[@]}"
  status=$?
  echo "== $part: exit code $status after $((SECONDS - began)) s"
  [[ $status -eq 0 ]] || code=1
done
exit $code
