#!/usr/bin/env bash
# Makes a folder with which a machine that can download nothing measures its GPU.
#
#   benchmarks/gpu/prepare.sh DIR               here: Linux on the same architecture, `make install` done
#   DIR/meditron-train/benchmarks/gpu/run.sh OUT    there: a Python with a CUDA build of torch, transformers and pytest
#
# DIR holds this working tree with the extension built in it, and wheels of the packages in wheels.txt. PYTHON is the
# interpreter of the other machine's version (default python3.12), with its headers; it needs no packages. Our CUDA
# kernels are built where nvcc is on PATH (MEDITRON_CUDA=0: not; MEDITRON_CUDA_ARCHS: for which GPUs); without them
# attention is PyTorch's.
set -euo pipefail

[ $# -eq 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3.12}
here=${VENV:-$root/.venv}/bin/python
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
mkdir -p "$1"
target=$(cd "$1" && pwd)
tree=$target/meditron-train

mkdir -p "$tree"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -c) | tar -x -C "$tree"

platforms=()
for glibc in 2_34 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${glibc}_$(uname -m)"); done
"$here" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp --platform "manylinux2014_$(uname -m)" "${platforms[@]}" \
    -c "$root/constraints.txt" -r "$root/benchmarks/gpu/wheels.txt" -d "$target/wheels"

# Headers of the torch of this environment: the operators use its stable ABI, and run with every torch from 2.10 on.
cuda=${MEDITRON_CUDA:-$(command -v nvcc > /dev/null && echo 1 || echo 0)}
packages=$("$here" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])')
(cd "$tree" && PYTHONPATH=$packages MEDITRON_CUDA=$cuda "$python" setup.py --quiet build_ext --inplace)
rm -rf "$tree/build"
echo "$target is ready for Python $version, $([ "$cuda" = 1 ] && echo with || echo without) CUDA kernels: \
$(du -sm "$target" | cut -f1) MB. There: meditron-train/benchmarks/gpu/run.sh OUT"
