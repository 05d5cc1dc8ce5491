#!/bin/bash
# clang-tidy over the runtime's sources, with the compile commands of the last build.
#   scripts/clang_tidy.sh PATH_TO_CLANG_TIDY
set -euo pipefail
cd "$(dirname "$0")/.."
tidy=${1:?usage: scripts/clang_tidy.sh PATH_TO_CLANG_TIDY}
commands=$(find build -name compile_commands.json -printf '%T@ %p\n' 2>/dev/null | sort -rn | head -n 1 | cut -d' ' -f2-)
if [ -z "$commands" ]; then
  echo "no compile_commands.json under build/: run 'make bootstrap' first" >&2
  exit 1
fi
# The build's compiler is g++: clang does not know all of its warning options.
find runtime_lib/src -name '*.cpp' -print0 | sort -z |
  xargs -0 -n 1 -P 2 "$tidy" --quiet -p "$(dirname "$commands")" --extra-arg=-Wno-unknown-warning-option
