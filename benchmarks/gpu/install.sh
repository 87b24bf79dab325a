#!/usr/bin/env bash
# Run on the GPU machine, in the checkout: install the wheels from wheels.sh, and link `longreach` to this checkout.
#
#   benchmarks/gpu/install.sh FOLDER...        # all pieces; afterwards: PYTHONPATH=build/src python benchmarks/gpu --out ...
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
joined=$(mktemp -d)
find "$@" -name '*.whl' -exec cp -t "$joined" {} +
for first in $(find "$@" -name '*.part-aa'); do
  name=$(basename "${first%.part-aa}")
  find "$@" -name "$name.part-*" | awk -F/ '{print $NF "\t" $0}' | sort | cut -f2 | xargs cat > "$joined/$name"
done
python -m pip install --quiet --no-index --no-deps --find-links "$joined" --requirement "$here/benchmarks/gpu/bare.txt"
rm -rf "$joined"
mkdir -p "$here/build/src"
ln -sfn "$here" "$here/build/src/longreach"
python -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.cuda.get_device_name(0))'
