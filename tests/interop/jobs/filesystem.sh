# A file system on $DISK keeps a file through unmount, dropped caches and a new mount, and fsck finds nothing.
mkfs.ext4 -q -F "/dev/$DISK"
mkdir -p /mnt/t
mount "/dev/$DISK" /mnt/t
dd if=/dev/urandom of=/mnt/t/file bs=1M count=24 conv=fsync status=none
mkdir /mnt/t/many
for i in $(seq 200); do echo "file $i" > "/mnt/t/many/$i"; done
before=$(cat /mnt/t/file /mnt/t/many/* | sha256sum | cut -c1-64)
umount /mnt/t
echo 3 > /proc/sys/vm/drop_caches
mount -o ro "/dev/$DISK" /mnt/t
after=$(cat /mnt/t/file /mnt/t/many/* | sha256sum | cut -c1-64)
umount /mnt/t
say before "$before"
say after "$after"
fsck.ext4 -fn "/dev/$DISK" > /tmp/fsck 2>&1 || { cat /tmp/fsck; exit 1; }
say fsck clean
