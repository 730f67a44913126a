#!/bin/sh
# Says what to install when a tool that `make` cannot bring itself is missing. Argument: the Python to use.
python=$1
missing=0
lacks() { echo "qpair: $1" >&2; missing=1; }

if ! command -v "$python" >/dev/null; then
  lacks "no $python: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  lacks "$python is older than 3.11: name a newer one by \`make PYTHON=python3.11 ...\`"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  lacks "$python has no venv module (Debian: apt-get install python3-venv)"
fi

if ! command -v cargo >/dev/null; then
  lacks "no cargo: install Rust 1.89 or newer by rustup"
else
  # "cargo 1.95.0 (...)": Debian 12's own is 1.63 and does not know this edition.
  minor=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
  [ "${minor:-0}" -ge 89 ] || lacks "$(cargo --version) is older than 1.89: install a newer Rust by rustup"
fi
if ! command -v gcc >/dev/null; then
  lacks "no gcc, which Rust links by (Debian: apt-get install gcc libc6-dev)"
elif ! echo 'int main(void) { return 0; }' | gcc -x c - -lpthread -o /dev/null 2>/dev/null; then
  # Debian's gcc only recommends them, and a container leaves recommendations out.
  lacks "gcc cannot link a program: the C library's development files are not there (Debian: apt-get install libc6-dev)"
fi
exit $missing
