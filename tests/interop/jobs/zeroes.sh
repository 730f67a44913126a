# Discard and write-zeroes change their own range and not one byte beside it.
D=/dev/$DISK
dd if=/dev/zero bs=1M count=8 status=none | tr '\0' '\253' > /tmp/pattern
dd if=/tmp/pattern of=$D bs=1M oflag=direct conv=fsync status=none
# The different bytes in blocks [$1, $1 + $2), so one value says all.
fill() { dd if=$D bs=4096 skip="$1" count="$2" iflag=direct status=none | python3 -c 'import sys; print(bytes(sorted(set(sys.stdin.buffer.read()))).hex())'; }
say written "$(fill 0 2048)"
blkdiscard -z -o 4096 -l 1048576 $D
say zeroed "$(fill 1 256)"
say before_zeroed "$(fill 0 1)"
say after_zeroed "$(fill 257 1)"
blkdiscard -o 4194304 -l 1048576 $D
say discarded_reads "$(fill 1024 256)"
say before_discarded "$(fill 1023 1)"
say after_discarded "$(fill 1280 1)"
blkdiscard $D
say whole_discard ok
