#!/usr/bin/env bash
# Every figure that one GPU can give, in less than nine minutes: benchmarks/gpu/run.sh OUT [--tiny] [--only PART]
#
# See benchmarks/gpu/day.py. In a folder that prepare.sh made, packages that PYTHON (default python3) lacks are taken
# from its wheels; nothing is downloaded.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
wheels=$root/../wheels
if [ -d "$wheels" ]; then
    site=$root/../site
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    mapfile -t missing < <("$python" - "$wheels"/*.whl <<'EOF'
import importlib.metadata, pathlib, sys

for wheel in sys.argv[1:]:
    try:
        importlib.metadata.version(pathlib.Path(wheel).name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
EOF
    )
    if [ ${#missing[@]} -gt 0 ]; then
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
            --upgrade --target "$site" "${missing[@]}"
    fi
fi
out=$(realpath -m "$1")
shift
cd "$root"
exec "$python" -m benchmarks.gpu.day "$out" "$@"
