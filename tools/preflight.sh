#!/bin/sh
# Says what to install when a tool that `make` cannot bring itself is missing. Argument: the Python to use.
python=$1
missing=0
lacks() { echo "qpair: $1" >&2; missing=1; }
command -v "$python" >/dev/null || lacks "no $python: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  lacks "$python is older than 3.11: name a newer one by \`make PYTHON=python3.11 ...\`"
"$python" -c 'import venv, ensurepip' 2>/dev/null || lacks "$python has no venv module (Debian: apt-get install python3-venv)"
command -v cargo >/dev/null || lacks "no cargo: install Rust 1.85 or newer by rustup"
command -v gcc >/dev/null || lacks "no gcc, which Rust links by (Debian: apt-get install gcc libc6-dev)"
exit $missing
