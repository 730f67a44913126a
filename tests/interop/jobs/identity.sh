# What Linux believes about the disk $DISK.
q=/sys/block/$DISK/queue
say serial "$(cat /sys/block/$DISK/serial)"
say bytes "$(blockdev --getsize64 /dev/$DISK)"
say logical_block_size "$(cat $q/logical_block_size)"
say physical_block_size "$(cat $q/physical_block_size)"
say read_only "$(cat /sys/block/$DISK/ro)"
say write_cache "$(cat $q/write_cache)"
say discard "$([ "$(cat $q/discard_max_bytes)" -gt 0 ] && echo yes || echo no)"
say write_zeroes "$([ "$(cat $q/write_zeroes_max_bytes)" -gt 0 ] && echo yes || echo no)"
# Which of the virtio features were agreed on, by their bits: 34 is the packed ring.
say packed "$(cut -c35 /sys/block/$DISK/device/features)"
say queues "$(ls /sys/block/$DISK/mq | wc -l)"
