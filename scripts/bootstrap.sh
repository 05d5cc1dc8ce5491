#!/bin/bash
# Brings a bare Debian or Ubuntu machine to the point where hetcomp builds and runs: system packages (where
# missing and permitted), a virtual environment, torch, hetcomp itself. Run by the Makefile; safe to run again.
#   scripts/bootstrap.sh VENV_DIR [--test-packages]
# With --test-packages it adds what only the tests need (Triton, AutoGPTQ, a browser that opens the plan's HTML report,
# qemu, a kernel to boot in it and mke2fs for its disk), nothing else; HETCOMP_SKIP_QEMU=1 leaves the last three out.
set -euo pipefail
venv=${1:?usage: scripts/bootstrap.sh VENV_DIR [--test-packages]}
purpose=${2:-run}
cd "$(dirname "$0")/.."

say() { printf 'bootstrap: %s\n' "$*"; }
die() { printf 'bootstrap: %s\n' "$*" >&2; exit 1; }

find_python() {  # the first interpreter that is new enough
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

test_kernel=build/test-kernel/vmlinuz  # what tests/e2e/virtual_machine.py boots

missing_test_packages() {
  missing_browser
  [ "${HETCOMP_SKIP_QEMU:-}" != 1 ] || return 0
  command -v qemu-system-x86_64 >/dev/null 2>&1 || echo qemu-system-x86
  PATH="$PATH:/usr/sbin:/sbin" command -v mke2fs >/dev/null 2>&1 || echo e2fsprogs
}

missing_browser() {  # a browser that tests/unit/test_plan_html.py finds, or the package that has one
  local browser
  for browser in "${HETCOMP_CHROMIUM:-}" chromium chromium-browser google-chrome; do
    [ -n "$browser" ] && command -v "$browser" >/dev/null 2>&1 && return
  done
  if grep -q '^ID=ubuntu' /etc/os-release 2>/dev/null; then echo chromium-browser; else echo chromium; fi
}

missing_packages() {  # Debian package names, one a line; what is there already is judged by use, not by dpkg
  if [ "$purpose" = --test-packages ]; then
    missing_test_packages
    return
  fi
  local python tool header
  python=$(find_python)
  [ -n "$python" ] || echo python3
  [ -n "$python" ] && "$python" -c 'import venv, ensurepip' 2>/dev/null || echo python3-venv
  command -v g++ >/dev/null 2>&1 || echo g++
  command -v cmake >/dev/null 2>&1 || echo cmake
  command -v ninja >/dev/null 2>&1 || echo ninja-build
  command -v git >/dev/null 2>&1 || echo git
  while read -r header package; do
    printf '#if !__has_include(<%s>)\n#error\n#endif\n' "$header" | g++ -std=c++20 -E -x c++ - >/dev/null 2>&1 ||
      echo "$package"
  done <<'HEADERS'
pcre2.h libpcre2-dev
utf8proc.h libutf8proc-dev
nlohmann/json.hpp nlohmann-json3-dev
CLI/CLI.hpp libcli11-dev
gtest/gtest.h libgtest-dev
xxhash.h libxxhash-dev
sha256.h libmd-dev
HEADERS
}

install_packages() {
  local missing as_root=()
  mapfile -t missing < <(missing_packages | sort -u)
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null 2>&1 ||
    die "this machine lacks ${missing[*]} (Debian's names) and has no apt-get; install them with its package manager and run make again."
  if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null 2>&1 && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
      as_root=(sudo)
    else
      die "this machine lacks ${missing[*]} and installing needs root; run 'apt-get install ${missing[*]}' as root, then make again."
    fi
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  mapfile -t missing < <(missing_packages | sort -u)
  [ ${#missing[@]} -eq 0 ] || die "still missing after apt-get install: ${missing[*]}."
}

# A kernel of the distribution, taken out of its package: nothing is installed, this machine boots what it did before.
fetch_test_kernel() {
  [ "${HETCOMP_SKIP_QEMU:-}" != 1 ] && [ ! -s "$test_kernel" ] || return 0
  command -v apt-get >/dev/null 2>&1 ||
    die "$test_kernel is missing and there is no apt-get to fetch it; put any x86-64 kernel with NUMA and a serial console there, or set HETCOMP_SKIP_QEMU=1."
  local folder meta image
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' RETURN
  apt-cache show qemu-system-x86 >/dev/null 2>&1 || [ "$(id -u)" != 0 ] || apt-get update -qq
  for meta in linux-image-cloud-amd64 linux-image-amd64 linux-image-virtual; do  # Debian, Debian, Ubuntu
    image=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    [ -z "$image" ] || break
  done
  [ -n "$image" ] || die "apt knows no Linux kernel to boot under qemu; run 'apt-get update' as root, or set HETCOMP_SKIP_QEMU=1."
  say "fetching $image to boot it under qemu"
  (cd "$folder" && apt-get -o APT::Sandbox::User=root download -qq "$image" >/dev/null) ||
    die "the package $image cannot be downloaded; run make again with a network, or set HETCOMP_SKIP_QEMU=1."
  mkdir -p "$(dirname "$test_kernel")"
  dpkg-deb --fsys-tarfile "$folder"/*.deb | tar -xO --wildcards './boot/vmlinuz-*' >"$folder/vmlinuz"
  mv "$folder/vmlinuz" "$test_kernel"
}

make_venv() {
  [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return
  local python
  python=$(find_python)
  [ -n "$python" ] || die "Python 3.11 or newer is needed; this system's python3 is older. Name one with PYTHON=/path/to/python3.12."
  say "making $venv with $("$python" --version)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
}

install_hetcomp() {
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
  # torch first and by itself: any build that is already there (CUDA, ROCm, CPU) satisfies hetcomp's range.
  if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    say "installing torch"
    "${pip[@]}" 'torch==2.13.0'
  fi
  say "building the runtime and installing hetcomp with its dependencies"
  "${pip[@]}" -e '.[dev]'
}

# The compiler of GPU kernels, in the version that the gpu extra asks for; torch's CUDA builds bring one.
install_triton() {
  "$venv/bin/python" -c 'import triton' 2>/dev/null && return
  say "installing triton"
  local wanted
  wanted=$("$venv/bin/python" -c '
from importlib.metadata import requires
print(next(r.partition(";")[0] for r in requires("hetcomp") if r.startswith("triton")))')
  "$venv/bin/python" -m pip --disable-pip-version-check install -qq "$wanted"
}

# Without what it depends on: a test takes the file of its layer alone. Its wheels, which end with Python 3.11, need no
# CUDA for that.
install_auto_gptq() {
  "$venv/bin/python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("auto_gptq") is None)' && return
  "$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps --only-binary :all: auto-gptq==0.7.1 \
    2>/dev/null || say "auto-gptq 0.7.1 has no wheel for this Python; the test that compares GPTQ with it is skipped"
}

install_packages
if [ "$purpose" = --test-packages ]; then
  install_triton
  install_auto_gptq
  fetch_test_kernel
  exit 0
fi
make_venv
install_hetcomp
say "ready: $venv/bin/hetcomp"
