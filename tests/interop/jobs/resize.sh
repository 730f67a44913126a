# $DISK grows and $OTHER changes while $DISK is busy: Linux sees it without anybody connecting anew.
say before "$(blockdev --getsize64 /dev/$DISK) $(blockdev --getsize64 /dev/$OTHER)"
fio --name=busy --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=randrw --bs=4k --iodepth=8 --size=16M --verify=crc32c --verify_fatal=1 \
  --time_based --runtime=15 --minimal > /tmp/fio.busy 2>&1 &
job=$!
sleep 2
pause   # the test resizes
for step in $(seq 100); do
  [ "$(blockdev --getsize64 /dev/$DISK) $(blockdev --getsize64 /dev/$OTHER)" != "$WANTED" ] || break
  sleep 0.1
done
say after "$(blockdev --getsize64 /dev/$DISK) $(blockdev --getsize64 /dev/$OTHER)"
end=$(( $(blockdev --getsize64 /dev/$DISK) / 4096 - 1 ))
head -c 4096 /dev/urandom > /tmp/block
dd if=/tmp/block of=/dev/$DISK bs=4096 seek=$end oflag=direct conv=notrunc 2>/dev/null
dd if=/dev/$DISK bs=4096 skip=$end iflag=direct 2>/dev/null | cmp - /tmp/block && say beyond "same" || say beyond "different"
wait $job || { cat /tmp/fio.busy; exit 1; }
say errors "$(cut -d';' -f5 /tmp/fio.busy)"
