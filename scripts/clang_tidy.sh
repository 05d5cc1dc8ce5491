#!/bin/bash
# clang-tidy over the runtime's sources, with the compile commands of the last build.
set -euo pipefail
cd "$(dirname "$0")/.."
tidy=$(command -v clang-tidy || true)
if [ -z "$tidy" ]; then
  echo "clang-tidy is not installed (apt-get install clang-tidy): skipped" >&2
  exit 0
fi
commands=$(find build -name compile_commands.json -printf '%T@ %p\n' 2>/dev/null | sort -rn | head -n 1 | cut -d' ' -f2-)
if [ -z "$commands" ]; then
  echo "no compile_commands.json under build/: run 'make bootstrap' first" >&2
  exit 1
fi
mapfile -t sources < <(find runtime_lib/src -name '*.cpp' | sort)
[ ${#sources[@]} -gt 0 ] || exit 0
printf '%s\0' "${sources[@]}" | xargs -0 -n 1 -P 2 "$tidy" --quiet -p "$(dirname "$commands")"
