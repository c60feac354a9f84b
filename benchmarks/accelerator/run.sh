#!/usr/bin/env bash
# Checks and times what there is on the accelerator at hand; each part leaves its JSON in the folder given (default:
# benchmarks/results/accelerator). Parts can be chosen: run.sh FOLDER exactness
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-benchmarks/results/accelerator}
shift || true
mkdir -p "$folder"
for part in "${@:-exactness}"; do
  python3 -m "benchmarks.accelerator.$part" --output "$folder/$part.json"
done
