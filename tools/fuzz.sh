#!/bin/bash
# Runs every fuzz target for $1 seconds: the Rust ones (cargo-fuzz, nightly compiler), then the Python ones (atheris).
# A finding ends it with a non-zero status; the input lies in fuzz/artifacts. Corpora are kept in fuzz/corpus and grow.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-600}
bin=$PWD/.venv/bin
rustup toolchain list 2>/dev/null | grep -q '^nightly' ||
  { echo "qpair: no nightly Rust compiler, which cargo-fuzz needs for its sanitizers: rustup toolchain install nightly" >&2; exit 1; }
[ -x "$bin/cargo-fuzz" ] || cargo install --quiet --locked --root .venv cargo-fuzz
"$bin/python" tools/dev_requirements.py dev fuzz | "$bin/pip" install --quiet --requirement /dev/stdin

export PATH=$bin:$PATH PYTHONPATH=src
for target in $(cargo +nightly fuzz list); do
  echo "== fuzz $target, $seconds s"
  # Findings abort by themselves; leaks are looked for by the tests.
  cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -rss_limit_mb=4096 -print_final_stats=1 -verbosity=0
done
for target in $("$bin/python" fuzz/python/run.py); do
  echo "== fuzz python $target, $seconds s"
  "$bin/python" fuzz/python/run.py "$target" -max_total_time="$seconds" -max_len=65536 -print_final_stats=1 -verbosity=0
done
