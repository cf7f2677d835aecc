#!/bin/sh
# Make a virtual environment with a Python that coldpress runs on, unless a working one is there.
# Usage: make_venv.sh VENV [PYTHON]
set -u
venv=$1
given=${2:-}

recent='import sys; sys.exit(sys.version_info < (3, 10))'
"$venv/bin/python" -c "$recent; import pip" 2>/dev/null && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && exit 0

found="" # recent enough, but cannot make environments
for python in ${given:-python3 python3.11 python3.12 python3.13 python3.10}; do
    "$python" -c "$recent" 2>/dev/null || continue
    found=$python
    "$python" -c 'import ensurepip, venv' 2>/dev/null || continue
    "$python" -m venv --clear "$venv" || exit 1
    echo "setup: $venv made with $("$python" --version)"
    exit 0
done

if [ -n "$found" ]; then
    version=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "setup: $found $version lacks the venv module; on Debian and Ubuntu: apt-get install python$version-venv" >&2
elif [ -n "$given" ]; then
    echo "setup: PYTHON=$given is not a Python 3.10 or newer" >&2
else
    echo "setup: no Python 3.10 or newer found; install one, or name it: make setup PYTHON=python3.12" >&2
fi
exit 1
