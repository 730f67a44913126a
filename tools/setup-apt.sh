#!/bin/sh
# Installs the Debian packages that the tests' peers need (tools/apt-packages.txt), where that is possible: as root, with apt.
# Elsewhere it says what is missing and succeeds: the tests that need it are then skipped by name. In CI (CI=true) that is a failure.
cd "$(dirname "$0")" || exit 1
missing=$(for p in $(cat apt-packages.txt); do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q ' installed$' || echo "$p"; done)
[ -n "$missing" ] || exit 0
missing=$(echo $missing)

give_up() {
  echo "qpair: $1; the tests that need it will be skipped by name: $missing" >&2
  [ "$CI" != true ]
  exit
}
command -v apt-get >/dev/null || give_up "no apt-get here"
[ "$(id -u)" = 0 ] || give_up "not root (run tools/setup-apt.sh as root once)"
echo "qpair: installing $missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update -q && apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends $missing; } >"$log" 2>&1 </dev/null ||
  { tail -n 20 "$log" >&2; give_up "apt-get failed"; }
