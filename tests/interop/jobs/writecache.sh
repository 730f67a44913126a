# The guest chooses how its writes are kept: cached, or each durable before it is answered.
mode() { cat /sys/block/$DISK/cache_type; }
say at_first "$(mode)"
echo "write through" > /sys/block/$DISK/cache_type
say through "$(mode)"
say told "$(cat /sys/block/$DISK/queue/write_cache)"
fio --name=through --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=randwrite --bs=8k --iodepth=4 --size=4M --verify=crc32c --verify_fatal=1 --minimal > /tmp/fio.through \
  || { cat /tmp/fio.through; exit 1; }
say errors "$(cut -d';' -f5 /tmp/fio.through)"
pause   # the test asks the server what it was told
echo "write back" > /sys/block/$DISK/cache_type
say back "$(mode)"
