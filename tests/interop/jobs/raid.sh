# fio writes with checksums and reads them back, round after round, while the test has the mirror behind $DISK lose and regain its legs.
rounds() {
  while [ ! -e /tmp/enough ]; do
    fio --name=round --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=randrw --rwmixread=30 --bs=4k --iodepth=16 --fsync=64 \
      --verify=crc32c --verify_fatal=1 --minimal --size=4M --randseed=$RANDOM > /tmp/fio.round || { cat /tmp/fio.round; return 1; }
    [ "$(cut -d';' -f5 /tmp/fio.round)" = 0 ] || return 1
    echo x >> /tmp/rounds
  done
}
rounds & worker=$!
pause   # the test breaks and mends the mirror meanwhile
touch /tmp/enough
wait $worker || exit 1
say rounds "$(wc -l < /tmp/rounds)"
# What every round left is read once more, now from the one leg that has been rebuilt.
fio --name=last --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=write --bs=64k --iodepth=4 --verify=crc32c --verify_fatal=1 \
  --minimal --size=8M --offset=8M > /tmp/fio.last || { cat /tmp/fio.last; exit 1; }
say last "$(cut -d';' -f5 /tmp/fio.last)"
