//! What concerns the whole process, and so has a process of its own.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use qpair_memory::Mapping;
use qpair_memory::fault::MAPPINGS_MAX;

fn memfd(length: u64) -> File {
    // SAFETY: the name is a C string, and nobody else owns the new descriptor.
    let file = unsafe { File::from(OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC))) };
    file.set_len(length).unwrap();
    file
}

#[test]
fn shared_mappings_are_as_many_as_the_handlers_table_is_long() {
    let file = memfd(4096);
    let mut mappings: Vec<_> = (0..MAPPINGS_MAX).map(|_| Mapping::shared(file.as_fd(), 4096).unwrap()).collect();
    assert_eq!(Mapping::shared(file.as_fd(), 4096).unwrap_err().to_string(), "more than 4096 shared mappings");
    mappings.pop();
    Mapping::shared(file.as_fd(), 4096).unwrap();
}

/// Run by the test below in a process that is meant to die.
#[test]
#[ignore = "ends its process by SIGBUS"]
fn touch_memory_that_is_not_ours() {
    let file = memfd(4096);
    let ours = Mapping::shared(file.as_fd(), 4096).unwrap();
    // SAFETY: a fresh mapping, which the handler does not know; the read behind the file's end is the point.
    unsafe {
        let stray = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        file.set_len(0).unwrap();
        stray.cast::<u8>().read_volatile();
    }
    drop(ours);
    std::process::exit(0);
}

#[test]
fn a_sigbus_elsewhere_still_ends_the_process() {
    let arguments = ["--exact", "touch_memory_that_is_not_ours", "--ignored"];
    let output = Command::new(std::env::current_exe().unwrap()).args(arguments).output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
}
