#!/bin/bash
# clang-tidy over the runtime's sources, each with the command that compiles it by itself.
#   scripts/clang_tidy.sh PATH_TO_CLANG_TIDY
set -euo pipefail
cd "$(dirname "$0")/.."
tidy=${1:?usage: scripts/clang_tidy.sh PATH_TO_CLANG_TIDY}
cmake -G Ninja -S runtime_lib -B build/clang-tidy -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DHETCOMP_UNITY_BUILD=OFF \
  -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON >/dev/null
# The build's compiler is g++: clang does not know all of its warning options.
find runtime_lib/src -name '*.cpp' -print0 | sort -z |
  xargs -0 -n 1 -P 2 "$tidy" --quiet -p build/clang-tidy --extra-arg=-Wno-unknown-warning-option
