# fio writes blocks of many sizes with a checksum in each, reads all of them back and compares.
common="--filename=/dev/$DISK --direct=1 --verify=crc32c --verify_fatal=1 --minimal --size=24M"
fio --name=aio --ioengine=libaio --rw=randwrite --bs=4k --iodepth=32 $common > /tmp/fio.aio || { cat /tmp/fio.aio; exit 1; }
say aio "$(cut -d';' -f5 /tmp/fio.aio)"
fio --name=uring --ioengine=io_uring --rw=randwrite --bsrange=512-256k --blockalign=512 --iodepth=16 --offset=24M $common > /tmp/fio.uring || { cat /tmp/fio.uring; exit 1; }
say uring "$(cut -d';' -f5 /tmp/fio.uring)"
fio --name=flush --ioengine=libaio --rw=randrw --rwmixread=30 --bs=8k --iodepth=8 --fsync=16 --offset=48M $common > /tmp/fio.flush || { cat /tmp/fio.flush; exit 1; }
say flush "$(cut -d';' -f5 /tmp/fio.flush)"
