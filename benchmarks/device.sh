#!/usr/bin/env bash
# Measure the 1B configuration on a machine with one GPU, in parts that can run alone; each writes JSON as it goes.
#
#     benchmarks/device.sh FOLDER [PART ...]     parts: correctness encode training (default: all, about six minutes)
#     TOY=1 benchmarks/device.sh FOLDER          the rehearsal: the same path with a tiny model, on a CPU
#
# Needs torch, transformers and safetensors; the package need not be installed. A part that fails ends with its error
# in FOLDER/PART.log and does not stop the others; a part killed by its time limit keeps the rows it has written.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
cp -r src/modular_star_encoder "$package/"
for room in modeling hub_configs model_cards; do cp -r "$room" "$package/modular_star_encoder/"; done
export PYTHONPATH="$package:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
for part in "${@:-correctness encode training}"; do
    for name in $part; do
        timeout "${LIMIT:-150}" python3 benchmarks/device.py "$name" --out "$out/$name.json" ${TOY:+--toy} 2>&1 |
            tee "$out/$name.log" || { echo "$name: failed or out of time" >&2; failed=1; }
    done
done
exit $failed
