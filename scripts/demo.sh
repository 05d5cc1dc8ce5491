#!/bin/bash
# The whole way of hetcomp on the model that comes with it: compile, look at the plan, generate text from Python's
# side and from the binary that needs no Python. Run by `make demo`.
#   scripts/demo.sh BIN_DIR_OF_THE_VENV
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: scripts/demo.sh BIN_DIR_OF_THE_VENV}
artifact=out/demo-moe.hetc
prompt="It was a fine morning in the spring, and"

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '$ %s\n' "$*"; }

mkdir -p out
step "1. Compile a trained 22-million-parameter MoE (6 layers, 32 experts, top-4) to native code."
show hetcomp compile models_zoo/demo-moe -o $artifact
"$bin/hetcomp" compile models_zoo/demo-moe -o "$artifact"

step "2. The plan: what runs where, what it costs, and how fast it should be."
show hetcomp-plan $artifact
"$bin/hetcomp-plan" "$artifact"

sampling=(--temperature 0.8 --top-p 0.95 --seed 4 -n 64)
step "3. Generate text from Python's command line."
show hetcomp run $artifact --prompt "\"$prompt\"" "${sampling[@]}"
"$bin/hetcomp" run "$artifact" --prompt "$prompt" "${sampling[@]}" | tee out/demo-python.txt

step "4. The same from the artifact's own binary: no Python, nothing but the C and C++ libraries."
show $artifact/bin/hetcomp-run $artifact --prompt "\"$prompt\"" "${sampling[@]}" --stats
"$artifact/bin/hetcomp-run" "$artifact" --prompt "$prompt" "${sampling[@]}" --stats 2>out/demo-stats.txt | tee out/demo-binary.txt
grep -E '"(tokens_per_second|load_seconds|threads)"' out/demo-stats.txt || true

cmp out/demo-python.txt out/demo-binary.txt
step "Both printed the same bytes. The artifact, a folder that you can copy to another machine of this kind:"
du -sh "$artifact" | cut -f1
ls "$artifact"
