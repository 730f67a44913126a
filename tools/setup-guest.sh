#!/bin/sh
# Makes the Linux guest and the QEMU that the interoperability tests and `make demo-vm` use. Where that is impossible the tests
# that need it are skipped by name; in CI (CI=true) that is a failure.
cd "$(dirname "$0")/.." || exit 1
PYTHONPATH=tools .venv/bin/python -m linux_guest setup && exit 0
echo "qpair: no Linux guest; the tests that boot one will be skipped by name" >&2
[ "$CI" != true ]
