# The guest moves to another QEMU, its disk to another server, while fio writes, reads back and compares. What the device has put into the page cache
# after QEMU has copied all memory once must be there, too: nothing but the device's log tells of it.
cached() { dd if=/dev/$DISK bs=1M skip=32 count=16 2>/dev/null; }
dd if=/dev/urandom of=/tmp/pattern bs=1M count=16 2>/dev/null
dd if=/tmp/pattern of=/dev/$DISK bs=1M seek=32 oflag=direct conv=notrunc 2>/dev/null
before=$(sha256sum < /tmp/pattern | cut -c1-64)
fio --name=across --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=16 --size=16M --verify=crc32c --verify_fatal=1 --verify_backlog=32 \
  --time_based --runtime=${SECONDS_BUSY} --minimal > /tmp/fio.across 2>&1 &
job=$!
sleep 1
echo 3 > /proc/sys/vm/drop_caches
pause   # QEMU copies all memory once
cached > /dev/null
echo GUEST-FILLED
pause   # and hands over to the other
after=$(cached | sha256sum | cut -c1-64)
[ "$after" = "$before" ] && echo "MOVED cache=same" || echo "MOVED cache=different"
wait $job || { cat /tmp/fio.across; exit 1; }
echo "MOVED errors=$(cut -d';' -f5 /tmp/fio.across)"
dmesg | grep -iE "I/O error|blk_update_request|reset" && echo "MOVED dmesg=bad" || echo "MOVED dmesg=clean"
