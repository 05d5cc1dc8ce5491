#!/bin/bash
# mypy over the package as it is installed. passes/, codegen_templates/ and models_zoo/ lie beside hetcomp/ in the
# repository but are hetcomp.passes etc. in the package, so a tree of links is laid out for mypy first.
#   scripts/typecheck.sh PATH_TO_MYPY
set -euo pipefail
cd "$(dirname "$0")/.."
mypy=${1:?usage: scripts/typecheck.sh PATH_TO_MYPY}
tree=build/typecheck
rm -rf "$tree"
mkdir -p "$tree/hetcomp"
for entry in hetcomp/*; do ln -s "$PWD/$entry" "$tree/hetcomp/"; done
for folder in passes codegen_templates models_zoo; do ln -s "$PWD/$folder" "$tree/hetcomp/"; done
rm -f "$tree/hetcomp/__pycache__"
export MYPYPATH=$tree
"$mypy" --config-file pyproject.toml --cache-dir .mypy_cache "$tree/hetcomp" | sed -E "s#^$tree/hetcomp/(passes|codegen_templates|models_zoo)/#\1/#; s#^$tree/##"
