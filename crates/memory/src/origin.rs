//! Where a descriptor's pages come from: whether a touch of them can wait for somebody else.
//!
//! A page that is not there yet is fetched by whoever touches it, and nobody can take that thread away from the kernel until the page
//! has come. A reactor that touches guest memory on a network file system waits for the network; on FUSE it waits for any program that the
//! guest's owner likes. Such memory is refused, by name, before it is mapped.
//!
//! How it works. Looking must not wait either: fstat and fstatfs ask the file system, and so may never return. What has
//! seals is the kernel's own memory (memfd, tmpfs, hugetlbfs), which is nearly every guest's: one fcntl, and done. For the rest, statx without synchronisation
//! gives the number of the mount, and `/proc/self/mountinfo` the type of its file system, from the kernel's own tables.
//!
//! Errors. [`MemoryError::MayStall`]. Closing such a descriptor may wait too, because FUSE and NFS are told of it: [`drop_apart`].
//!
//! Not seen: a file system on a block device whose server is gone, and overlays above what would be refused. A mount of another
//! namespace is known by its device; where nothing is known, the memory is refused.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::MemoryError;

/// Types of file systems, up to their first dot, that ask another program or machine for pages.
const ASKING: [&str; 24] = [
    "fuse",
    "fuseblk",
    "virtiofs",
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "afs",
    "coda",
    "ncpfs",
    "lustre",
    "gpfs",
    "beegfs",
    "orangefs",
    "pvfs2",
    "glusterfs",
    "gfs2",
    "ocfs2",
    "vboxsf",
    "vmhgfs",
    "autofs",
];

/// The size of what may be mapped, in bytes. Refuses a descriptor whose pages may never come, and never waits for an answer itself.
pub(crate) fn size_unless_stalling(fd: BorrowedFd<'_>) -> Result<u64, MemoryError> {
    let file = look(fd)?;
    // SAFETY: a plain fcntl on a descriptor that is borrowed. Only memory of the kernel's own has seals.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) } < 0 {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")
            .map_err(|source| MemoryError::Os { call: "read /proc/self/mountinfo", source })?;
        let kind = kind_of(&mounts, file.mount, file.device);
        if may_stall(kind, file.device) {
            let kind = kind.unwrap_or("unknown (no mount of this process shows it)").to_owned();
            return Err(MemoryError::MayStall { kind });
        }
    }
    Ok(file.size)
}

/// Whether a page of a file may never come. A file system that is nowhere seen is trusted only if it is on a block device.
fn may_stall(kind: Option<&str>, device: (u32, u32)) -> bool {
    match kind {
        Some(kind) => ASKING.contains(&kind.split('.').next().unwrap_or(kind)),
        None => device.0 == 0,
    }
}

/// The type of a mount's file system in the text of mountinfo: by the mount's number or, in another namespace, by the device.
fn kind_of(mounts: &str, mount: u64, device: (u32, u32)) -> Option<&str> {
    let (number, device) = (mount.to_string(), format!("{}:{}", device.0, device.1));
    let find = |position: usize, value: &str| {
        let line = mounts.lines().find(|line| line.split(' ').nth(position) == Some(value))?;
        line.split_once(" - ")?.1.split(' ').next()
    };
    find(0, &number).or_else(|| find(2, &device))
}

/// Drops what may wait while it goes, a refused descriptor say, on a thread of its own.
pub fn drop_apart(what: impl Send + 'static) {
    // Without a thread to be had it goes here: that is no worse than without this.
    drop(std::thread::Builder::new().name("qpair-close".into()).stack_size(64 << 10).spawn(move || drop(what)));
}

struct File {
    size: u64,
    mount: u64,
    device: (u32, u32),
}

fn look(fd: BorrowedFd<'_>) -> Result<File, MemoryError> {
    // SAFETY: an all-zero statx is a valid value of the C struct.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    let wanted = libc::STATX_SIZE | libc::STATX_MNT_ID;
    // SAFETY: an empty C string, and a valid place to write to. The descriptor is borrowed for the call.
    if unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, wanted, &mut found) } != 0 {
        return Err(MemoryError::last_os("statx"));
    }
    // Before Linux 5.8 there is no number: 0 is no mount's, and the device decides.
    let mount = if found.stx_mask & libc::STATX_MNT_ID == 0 { 0 } else { found.stx_mnt_id };
    Ok(File { size: found.stx_size, mount, device: (found.stx_dev_major, found.stx_dev_minor) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};

    use super::*;

    const MOUNTS: &str = "\
22 27 0:20 / /proc rw,nosuid shared:12 - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 27 0:50 / /mnt/a\\040b rw - fuse.sshfs peer:/ rw,user_id=0
31 27 0:51 / /mnt/nfs rw master:1 propagate_from:2 - nfs4 peer:/ rw,hard
";

    #[test]
    fn a_mount_is_found_by_its_number_and_else_by_its_device() {
        assert_eq!(kind_of(MOUNTS, 27, (9, 9)), Some("ext4"));
        assert_eq!(kind_of(MOUNTS, 30, (8, 1)), Some("fuse.sshfs"));
        assert_eq!(kind_of(MOUNTS, 999, (0, 51)), Some("nfs4"));
        assert_eq!(kind_of(MOUNTS, 999, (0, 52)), None);
        assert_eq!(kind_of("27 nonsense", 27, (8, 1)), None);
    }

    #[test]
    fn what_asks_others_for_pages_may_stall_and_what_is_here_does_not() {
        for kind in ["fuse", "fuse.sshfs", "fuseblk", "virtiofs", "nfs", "nfs4", "cifs", "9p", "ceph"] {
            assert!(may_stall(Some(kind), (8, 1)), "{kind}");
        }
        for kind in ["tmpfs", "hugetlbfs", "devtmpfs", "ext4", "xfs", "btrfs", "zfs", "overlay", "fusectl"] {
            assert!(!may_stall(Some(kind), (0, 40)), "{kind}");
        }
        assert!(may_stall(None, (0, 52)), "of nobody knows what");
        assert!(!may_stall(None, (8, 1)), "on a block device");
    }

    fn memfd(flags: u32) -> std::io::Result<OwnedFd> {
        // SAFETY: the name is a C string, and nobody else owns the new descriptor.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | flags) };
        // SAFETY: as above; a failure is not a descriptor and is not made one.
        if fd < 0 { Err(std::io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
    }

    #[test]
    fn memory_of_the_kernels_own_and_files_on_local_disks_are_taken() {
        for flags in [0, libc::MFD_HUGETLB] {
            let file = std::fs::File::from(memfd(flags).unwrap());
            file.set_len(4 << 20).unwrap();
            assert_eq!(size_unless_stalling(file.as_fd()).unwrap(), 4 << 20);
        }
        for folder in ["/dev/shm", env!("CARGO_MANIFEST_DIR")] {
            let path = std::path::Path::new(folder).join(format!(".qpair-origin-{}", std::process::id()));
            let file = std::fs::File::create_new(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            file.set_len(12345).unwrap();
            assert_eq!(size_unless_stalling(file.as_fd()).unwrap(), 12345, "{folder}");
        }
    }

    #[test]
    fn a_file_that_no_mount_shows_is_refused_by_name() {
        // The kernel's own mount of anonymous files: the same as a file of a mount namespace that we do not see.
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors, which nobody else owns.
        let pipe = unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
            ends.map(|fd| OwnedFd::from_raw_fd(fd))
        };
        let error = size_unless_stalling(pipe[0].as_fd()).unwrap_err().to_string();
        assert_eq!(
            error,
            "memory on a file system of type unknown (no mount of this process shows it) may never answer: \
             it must be a memfd, on tmpfs or hugetlbfs, or on a local disk"
        );
    }
}
