"""vhost-user-blk target: block devices for virtual machines and other virtio drivers, over a unix socket."""
