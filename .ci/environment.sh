# Sourced by the checks: installs the package as a user would, into a fresh environment, `$venv`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d) # deleted at the end, with all that is in it
trap 'rm -rf "$work"' EXIT
venv=$work/venv
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet '.[test]'
