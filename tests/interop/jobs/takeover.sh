# fio writes with checksums and reads them back, round after round: first undisturbed, then while the test lets one server take another's place.
# What is said is the longest that any request took, in microseconds (fields 39 and 80 of fio's terse output: total latency of reads, of writes).
rounds() {
  rm -f /tmp/enough; : > /tmp/rounds
  while [ ! -e /tmp/enough ]; do
    fio --name=round --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=randrw --rwmixread=30 --bs=4k --iodepth=8 \
      --verify=crc32c --verify_fatal=1 --minimal --size=4M --randseed=$RANDOM > /tmp/fio.round || { cat /tmp/fio.round; return 1; }
    [ "$(cut -d';' -f5 /tmp/fio.round)" = 0 ] || return 1
    cut -d';' -f39,80 /tmp/fio.round >> /tmp/rounds
  done
}
longest() { tr ';' '\n' < /tmp/rounds | cut -d. -f1 | sort -n | tail -1; }

rounds & worker=$!
pause
touch /tmp/enough; wait $worker || exit 1
say undisturbed "$(longest)"
say rounds_before "$(wc -l < /tmp/rounds)"
rounds & worker=$!
echo TAKE-OVER-NOW
pause
touch /tmp/enough; wait $worker || exit 1
say disturbed "$(longest)"
say rounds "$(wc -l < /tmp/rounds)"
dmesg | grep -i "i/o error\|$DISK.*error" && exit 1
exit 0
