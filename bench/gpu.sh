#!/usr/bin/env bash
# Every row of docs/performance.md's GPU section, as Markdown, within ten minutes:
#
#     bash bench/gpu.sh | tee gpu.md            # DEVICE=cpu BACKBONE=toy bash bench/gpu.sh rehearses it
#
# In order of worth, each printed as it ends, in a process of its own. It trains nothing, and builds nothing but
# parts of random weights. A row that fails or takes too long says so, and the next one comes. ERRORS names
# a file for the reasons.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DEVICE=${DEVICE:-cuda} BACKBONE=${BACKBONE:-sd15}
if [ "$BACKBONE" = toy ]; then batch=2 steps=2 dtype=float32 size=1,8,2,64; else batch=4 steps=20 dtype=bfloat16 size=1,768,16,4096; fi
parts=${PARTS:-$(mktemp -d)}  # PARTS: a folder of random parts that stays
[ -n "${PARTS:-}" ] || trap 'rm -rf "$parts"' EXIT

errors=${ERRORS:-/dev/null}

section() { printf '\n### %s\n\n' "$1"; }
within() { timeout "$@" || printf '\nNot within %s s, or failed: `%s`\n' "$1" "${*:2}"; }
bench() { within "$1" "$PYTHON" -m "bench.$2" --device "$DEVICE" "${@:3}" 2>>"$errors"; }

section "A training step"
step=(train_step --backbone "$BACKBONE" --batch "$batch" --precision bf16 --folder "$parts" --repeat 5)
bench 180 "${step[@]}" --limit 40
section "An edit"
bench 70 edit_time --backbone "$BACKBONE" --batch 1 --steps "$steps" --dtype "$dtype" --repeat 3 --folder "$parts"
section "The scan"
mamba=$("$PYTHON" -c 'import mamba_ssm' 2>/dev/null && echo mamba-ssm)
fast=$([ "$DEVICE" = cuda ] && echo triton || echo numba)
bench 50 scan --sizes "$size" --only "$fast" chunked $mamba
section "Kernel parity"
within 100 "$PYTHON" -m pytest -q -o addopts= tests/test_scan_kernels.py -k "${PARITY:-triton or mamba or chunked}" 2>>"$errors" | tail -1
section "CUDA graphs: a replay is the step"
within 50 "$PYTHON" -m pytest -q -o addopts= tests/test_graphs.py 2>>"$errors" | tail -1
if [ "$DEVICE" = cuda ]; then
    section "A training step, compiled"
    bench 140 "${step[@]}" --limit 70 --only "ours, all four" --ways compiled "CUDA graphs"
fi
