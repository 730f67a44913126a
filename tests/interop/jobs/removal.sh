# $DISK loses what is behind it while it is written to.
fio --name=worker --filename=/dev/$DISK --direct=1 --ioengine=libaio --rw=randrw --bs=4k --iodepth=32 --time_based --runtime=600 --minimal > /tmp/fio 2>&1 & worker=$!
completed() { awk '{print $1 + $5}' "/sys/block/$DISK/stat"; }
while [ "$(completed)" -lt 500 ]; do sleep 0.1; done
say before "$(completed)"
pause   # the test removes the bdev meanwhile
if wait $worker; then say worker "ended well"; else say worker "ended with an error"; fi
if dd if=/dev/$DISK of=/dev/null bs=4096 count=1 iflag=direct 2> /dev/null; then say read worked; else say read failed; fi
if dd if=/dev/zero of=/dev/$DISK bs=4096 count=1 oflag=direct 2> /dev/null; then say write worked; else say write failed; fi
# The driver lets go of the device and takes it anew: all rings are reset and started.
device=$(basename "$(readlink -f /sys/block/$DISK/device)")
echo "$device" > /sys/bus/virtio/drivers/virtio_blk/unbind
echo "$device" > /sys/bus/virtio/drivers/virtio_blk/bind
if dd if=/dev/$DISK of=/dev/null bs=4096 count=1 iflag=direct 2> /dev/null; then say rebound worked; else say rebound failed; fi
