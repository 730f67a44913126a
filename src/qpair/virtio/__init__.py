"""virtio-user initiator: any vhost-user-blk target (ours, SPDK's, QEMU's) becomes a bdev."""
