# $DISK is read-only: Linux knows, no write gets through, and it can still be read.
say read_only "$(cat /sys/block/$DISK/ro)"
blockdev --setrw "/dev/$DISK" 2>/dev/null || true
if dd if=/dev/zero of="/dev/$DISK" bs=4096 count=1 oflag=direct status=none 2> /tmp/dd; then say write accepted; else say write refused; fi
say first_block "$(dd if="/dev/$DISK" bs=4096 count=1 iflag=direct status=none | sha256sum | cut -c1-64)"
