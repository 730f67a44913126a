# fio writes with checksums and reads them back on $DISK, and records are written to $RECORDS, while the test kills the server and starts it again.
python3 /job/records.py "/dev/$RECORDS" "$WRITERS" "$BLOCKS" /tmp/enough > /tmp/records 2> /tmp/records.err & writer=$!
rounds() {
  while [ ! -e /tmp/enough ]; do
    fio --name=round --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=randrw --rwmixread=30 --bsrange=512-16k --blockalign=512 \
      --iodepth=32 --fsync=64 --verify=crc32c --verify_fatal=1 --minimal --size=2M --randseed=$RANDOM > /tmp/fio.round || { cat /tmp/fio.round; return 1; }
    [ "$(cut -d';' -f5 /tmp/fio.round)" = 0 ] || return 1
    echo x >> /tmp/rounds
  done
}
rounds & worker=$!
pause   # the test kills and starts meanwhile
touch /tmp/enough
wait $worker || { dmesg | tail -5; exit 1; }
wait $writer || { cat /tmp/records.err; dmesg | tail -5; exit 1; }
say rounds "$(wc -l < /tmp/rounds)"
say records "$(cut -d' ' -f2 /tmp/records | tr '\n' ' ')"
say complaints "$(dmesg | grep -c -i -e 'I/O error' -e 'is not a head' -e 'timeout' || true)"
