//! Adds one to an eventfd that a peer shares, without ever waiting for the peer.
//!
//! The open file is the peer's too: it can clear O_NONBLOCK behind our back and fill the counter, and write(2) then sleeps until the peer
//! pleases, with the reactor and every disk on it. Looking before writing leaves a gap that a peer can aim at. The kernel's own way of
//! signalling an eventfd never sleeps: a full counter stays full. It is reached by an asynchronous read of nothing whose end
//! is to be told there (io_submit(2), IOCB_FLAG_RESFD), in one system call as a write would be. A descriptor that is no eventfd is refused by it.
//!
//! Where asynchronous I/O is forbidden (io_setup(2) fails) it is poll(2), then write(2), gap and all.

use std::cell::Cell;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct iocb` of linux/aio_abi.h, little-endian.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}
const _: () = assert!(size_of::<Iocb>() == 64);

/// `struct io_event` of linux/aio_abi.h.
type IoEvent = [u64; 4];

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_FLAG_RESFD: u32 = 1;
/// Ends that may wait to be reaped. Reaped half as often.
const DEPTH: u32 = 64;

/// One thread's context.
struct Context {
    id: libc::c_ulong,
    /// A file to read nothing from.
    empty: OwnedFd,
    unreaped: Cell<u32>,
}

thread_local! {
    static CONTEXT: Option<Context> = Context::new();
}

/// Adds one; a full counter stays full. Never waits.
pub(crate) fn signal(eventfd: BorrowedFd<'_>) {
    // A thread that is ending has given its context up already.
    let done = CONTEXT.try_with(|context| context.as_ref().is_some_and(|context| context.signal(eventfd)));
    if !done.unwrap_or(false) {
        write_if_ready(eventfd);
    }
}

impl Context {
    fn new() -> Option<Self> {
        // SAFETY: the name is a valid C string; the descriptor returned is new and owned by nobody else.
        let empty = unsafe {
            let fd = libc::memfd_create(c"qpair-nothing".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return None;
            }
            OwnedFd::from_raw_fd(fd)
        };
        let mut id: libc::c_ulong = 0;
        // SAFETY: `id` is a valid place for the context's number and zero, as io_setup wants it.
        let rc = unsafe { libc::syscall(libc::SYS_io_setup, DEPTH, &mut id) };
        (rc == 0).then(|| Self { id, empty, unreaped: Cell::new(0) })
    }

    /// False: aio does not work at all, so another way must be taken. A refused descriptor counts as done.
    fn signal(&self, eventfd: BorrowedFd<'_>) -> bool {
        if self.unreaped.get() >= DEPTH / 2 {
            self.reap();
        }
        let mut request = Iocb {
            opcode: IOCB_CMD_PREAD,
            fd: self.empty.as_raw_fd() as u32,
            flags: IOCB_FLAG_RESFD,
            result_fd: eventfd.as_raw_fd() as u32,
            ..Iocb::default()
        };
        let list = [&raw mut request];
        // SAFETY: one request, alive until the call returns; it reads no byte, so no buffer is touched, then or later.
        let rc = unsafe { libc::syscall(libc::SYS_io_submit, self.id, 1 as libc::c_long, list.as_ptr()) };
        if rc == 1 {
            self.unreaped.set(self.unreaped.get() + 1);
            return true;
        }
        std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
    }

    fn reap(&self) {
        let mut events = [IoEvent::default(); DEPTH as usize];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `events` has room for as many as are asked for.
        unsafe { libc::syscall(libc::SYS_io_getevents, self.id, 0 as libc::c_long, libc::c_long::from(DEPTH), events.as_mut_ptr(), &now) };
        self.unreaped.set(0);
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is this thread's and nothing is under way in it. In a forked child it does not exist: an error, and no harm.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.id) };
    }
}

fn write_if_ready(eventfd: BorrowedFd<'_>) {
    let mut look = libc::pollfd { fd: eventfd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: `look` is one valid pollfd, and the buffer written from has the eight bytes named.
    unsafe {
        if libc::poll(&mut look, 1, 0) == 1 && look.revents & libc::POLLOUT != 0 {
            libc::write(eventfd.as_raw_fd(), (&raw const ONE).cast(), 8);
        }
    }
}

static ONE: u64 = 1;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    fn eventfd(flags: i32) -> File {
        // SAFETY: the descriptor is new; a failure is caught by the assertion.
        let fd = unsafe { libc::eventfd(0, flags) };
        assert!(fd >= 0);
        // SAFETY: as above.
        unsafe { File::from_raw_fd(fd) }
    }

    fn count(mut file: &File) -> u64 {
        let mut bytes = [0; 8];
        file.read_exact(&mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn each_signal_adds_one_also_past_the_depth() {
        let event = eventfd(0);
        for _ in 0..10 * DEPTH {
            signal(event.as_fd());
        }
        assert_eq!(count(&event), u64::from(10 * DEPTH));
    }

    #[test]
    fn a_full_counter_in_blocking_mode_does_not_hold_us() {
        let event = eventfd(0);
        (&event).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..10 {
            signal(event.as_fd());
        }
        assert!(count(&event) >= u64::MAX - 1);
        signal(event.as_fd());
        assert_eq!(count(&event), 1);
    }

    #[test]
    fn what_is_no_eventfd_is_left_alone() {
        let mut file = File::from(Context::new().unwrap().empty.try_clone().unwrap());
        signal(file.as_fd());
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(content, b"");
    }

    #[test]
    fn without_aio_a_full_counter_does_not_hold_us_either() {
        let event = eventfd(0);
        write_if_ready(event.as_fd());
        assert_eq!(count(&event), 1);
        (&event).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        write_if_ready(event.as_fd());
        assert_eq!(count(&event), u64::MAX - 1);
    }
}
