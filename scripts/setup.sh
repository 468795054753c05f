#!/usr/bin/env bash
# Sets up .venv (pinned packages, the CPU build of torch) and fetches the default base model.
# Every step leaves a mark when it is whole, so running this again repairs an interrupted set-up
# and does nothing after a finished one. `setup.sh dev` adds what the tests need.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
pins=constraints.txt
python=${PYTHON:-python3}

wanted=$(cat scripts/setup.sh pyproject.toml $pins | cksum | cut -d' ' -f1)
mark() { echo "$wanted" > "$venv/.$1.partial" && mv "$venv/.$1.partial" "$venv/.$1"; }
marked() { [ "$(cat "$venv/.$1" 2>/dev/null)" = "$wanted" ]; }
install() { "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --constraint $pins "$@"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Luthier needs Python 3.11 or newer; $("$python" --version) was found. Set PYTHON=/path/to/python3." >&2; exit 2; }

# A killed pip leaves packages that look installed and are not: begin anew unless the last end was clean.
if [ -e "$venv/.installing" ] || [ ! -x "$venv/bin/python" ]; then
  [ -d "$venv" ] && echo "Repairing an interrupted set-up ..."
  rm -rf "$venv" && "$python" -m venv "$venv"
fi

if ! marked runtime; then
  echo "Installing Luthier's packages into $venv (once) ..."
  touch "$venv/.installing"
  torch=$(grep '^torch==' $pins)
  # The CPU build: from where pip looks anyway, else from PyTorch's own index, else whatever there is.
  install "$torch+cpu" 2>/dev/null ||
    install "$torch+cpu" --index-url https://download.pytorch.org/whl/cpu --retries 1 2>/dev/null ||
    install "$torch"
  install setuptools wheel
  install --no-build-isolation --editable .
  rm "$venv/.installing"
  mark runtime
fi

if [ "${1:-}" = dev ] && ! marked dev; then
  echo "Installing what the tests need ..."
  touch "$venv/.installing"
  install --no-build-isolation --editable '.[dev]'
  rm "$venv/.installing"
  mark dev
fi

if [ "${1:-}" = dev ] && ! marked browser; then
  # The report's page is tested in Chromium; where there is none, these tests are skipped and say so.
  if ! { command -v chromium && command -v chromedriver; } >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing Chromium for the tests of the report's page ..."
    quick="-o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60"
    { timeout 120 apt-get $quick update && DEBIAN_FRONTEND=noninteractive timeout 480 \
        apt-get $quick install -y --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 ||
      echo "It could not be installed: those tests will be skipped."
  fi
  mark browser
fi

if ! marked base; then
  "$venv/bin/python" -m luthier.models.embedded >/dev/null
  mark base
fi
