#!/usr/bin/env bash
# Checks and times what there is on the accelerator at hand, in under nine minutes on one H100. Each part leaves its JSON
# in FOLDER (default: benchmarks/results/accelerator), written row by row, and has a time of its own.
#
#   benchmarks/accelerator/run.sh [FOLDER [--small] [PART ...]]
#
# PARTs: exactness kernels pruning training figure3 (all by default). --small: a size for a processor.
# PYTHON names the interpreter. IMAGES names the file that `python -m benchmarks.accelerator.images FILE` wrote; without
# it, CIFAR-10 comes from TFDS. LIMIT gives each part that many seconds instead of its own. Exit code 1: some part failed.
# Compiled programs are kept for the time of the command, those of training and figure3 in one place, those of the other
# parts apart, so that a first call compiles; JAX_COMPILATION_CACHE_DIR names one place for all and for good.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-benchmarks/results/accelerator}
shift || true
small=()
if [[ ${1:-} == --small ]]; then small=(--small); shift; fi
[[ $# -gt 0 ]] || set -- exactness kernels pruning training figure3
declare -A limits=([exactness]=100 [kernels]=170 [pruning]=70 [training]=65 [figure3]=130)
export XLA_PYTHON_CLIENT_PREALLOCATE=false      # PyTorch and several processes share the card
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"
code=0
flags=${XLA_FLAGS:-}
kept=${JAX_COMPILATION_CACHE_DIR:-}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.1}
for part in "$@"; do
  if [[ -z ${limits[$part]:-} ]]; then echo "unknown part $part; choose from ${!limits[*]}" >&2; exit 2; fi
  images=()
  if [[ -n ${IMAGES:-} && ( $part == training || $part == figure3 ) ]]; then images=(--images "$IMAGES"); fi
  limit=${LIMIT:-${limits[$part]}}
  place=$part
  export XLA_FLAGS=$flags
  if [[ $part == training || $part == figure3 ]]; then      # XLA times no candidates on the card
    place=training
    [[ $flags == *xla_gpu_autotune_level* ]] || export XLA_FLAGS="$flags --xla_gpu_autotune_level=0"
  fi
  export JAX_COMPILATION_CACHE_DIR=${kept:-$temporary/$place}
  began=$SECONDS
  timeout --kill-after=5 "$limit" "${PYTHON:-python3}" -m "benchmarks.accelerator.$part" \
    --output "$folder/$part.json" --seconds $((limit - 15)) "${small[@]}" "${images[@]}"
  status=$?
  echo "== $part: exit code $status after $((SECONDS - began)) s"
  [[ $status -eq 0 ]] || code=1
done
exit $code
