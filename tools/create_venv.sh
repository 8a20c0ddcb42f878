#!/bin/sh
# Create the virtual environment, or say in one line what is missing for it.
# Usage: tools/create_venv.sh PYTHON FOLDER
set -eu
python=$1 folder=$2
fail() { echo "make: $*" >&2; exit 1; }

command -v "$python" >/dev/null 2>&1 ||
    fail "there is no '$python' here. Install Python 3.10 or later, or name one: make install PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; Python 3.10 or later is needed. Name another: make install PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "'$python' cannot create virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
echo "Creating $folder with $("$python" --version)."
"$python" -m venv "$folder"
