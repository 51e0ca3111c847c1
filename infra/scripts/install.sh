#!/usr/bin/env bash
# Installs Consilium from this folder, without any network.
# Usage: ./install.sh FOLDER     makes FOLDER/.venv; FOLDER must not exist. PYTHON names Python 3.11.
# Whoever sent the bundle tells you the digest of SHA256SUMS by another way; compare it first:
#   sha256sum SHA256SUMS
set -euo pipefail

bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${1:?the folder to make}
python=${PYTHON:-python3.11}

fail() {
    echo "install: $*" >&2
    exit 2
}

command -v "$python" > /dev/null || fail "found no $python, needed Python 3.11; name it in PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
    || fail "found another Python, needed 3.11; name it in PYTHON"
[ ! -e "$target" ] || fail "found $target already, needed a new folder"
mkdir -p "$target"
target=$(cd "$target" && pwd)
trap '[ $? = 0 ] || rm -rf "$target"' EXIT

cd "$bundle"
faulty=$(sha256sum --check --quiet --strict SHA256SUMS 2>&1) \
    || fail "found a file that was changed or is missing: $(head -n 1 <<< "$faulty")"
strange=$(find . ! -type f ! -type d -printf '%P\n' | head -n 1)
[ -z "$strange" ] || fail "found what is no plain file: $strange"
added=$(find . -type f ! -path ./SHA256SUMS -printf '%P\n' | LC_ALL=C sort \
    | LC_ALL=C comm -23 - <(cut -c 67- SHA256SUMS | LC_ALL=C sort))
[ -z "$added" ] || fail "found a file that is not of the bundle: $(head -n 1 <<< "$added")"

cp -R sources/. "$target/"
"$python" -m venv "$target/.venv"
"$target/.venv/bin/python" -I -m pip --quiet --isolated --disable-pip-version-check install \
    --no-cache-dir --no-index --no-deps --require-hashes --find-links "$bundle/wheels" \
    --requirement requirements.txt
"$target/.venv/bin/python" -I -c 'import flows' \
    || fail "found that the installed package cannot be imported"
echo "install: $target/.venv/bin/consilium"
