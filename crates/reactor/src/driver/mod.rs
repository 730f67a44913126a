//! I/O drivers: how a reactor reads files, watches descriptors and sleeps.
//!
//! Three of them, one trait: [`uring`] (one io_uring a reactor), [`epoll`] (epoll and a small pool of threads, where
//! io_uring is forbidden) and the simulator's. [`open`] chooses.
//!
//! Contract. `submit` only queues; `unplug` hands over all that was queued, with one system call at most. Each
//! submitted operation is answered by exactly one [`Completion::Done`], also after its file was closed or the driver is
//! told to [`Driver::cancel_all`]. A watch is persistent and edge-triggered: every notification after the last
//! report leads to at least one more [`Completion::Ready`], and none needs a system call to re-arm. `reap` makes no
//! system call when nothing came (io_uring says so in its ring; epoll cannot, so it looks at most every
//! [`epoll::LOOK_NS`] while watches exist). The driver holds the memory and the file of an operation until it is done,
//! and is not gone before: dropping it cancels what it can and waits for the rest.
//!
//! Errors. What cannot be begun (a list outside its region, an offset above 2^63) is answered by a `Done` with the
//! errno that the kernel would give. Short transfers are reported as they are.

use std::fs::File;
use std::io;
use std::sync::Arc;

use qpair_memory::SgList;

use crate::PollerId;
use crate::event::Event;

pub mod epoll;
mod pool;
mod slots;
pub mod uring;
mod watches;

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// Into the list.
    Read,
    /// From the list.
    Write,
    /// Write that is on stable media when done (RWF_DSYNC).
    WriteDurable,
    /// fdatasync.
    Sync,
    /// fallocate PUNCH_HOLE | KEEP_SIZE over `length`; on a block device BLKDISCARD's counterpart.
    Punch,
    /// fallocate ZERO_RANGE | KEEP_SIZE over `length`.
    Zero,
}

/// A file that drivers can work on.
#[derive(Clone, Debug)]
pub enum FileRef {
    /// A real one.
    Real(Arc<File>),
    /// File number n of the simulator.
    Simulated(u32),
}

/// One operation on a file.
#[derive(Debug)]
pub struct Request {
    /// What.
    pub op: FileOp,
    /// On which file, held until done.
    pub file: FileRef,
    /// First byte.
    pub offset: u64,
    /// Bytes, for the operations without a list.
    pub length: u64,
    /// Memory, held until done. At most 1024 entries (IOV_MAX).
    pub list: SgList,
    /// Whose [`crate::Poller::done`] is called.
    pub poller: PollerId,
    /// Handed back with the result.
    pub value: u64,
}

/// What a driver reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// An operation ended: bytes, or a negative errno.
    Done {
        /// Whose.
        poller: PollerId,
        /// As submitted.
        value: u64,
        /// Bytes or negative errno.
        result: i32,
    },
    /// A watched event was notified.
    Ready {
        /// Who watches.
        poller: PollerId,
    },
}

/// Names a watch of one driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId(pub u32);

/// See the module's contract.
pub trait Driver {
    /// "io_uring", "epoll" or "simulated".
    fn name(&self) -> &'static str;
    /// Queues a request. Gives it back when the driver is full: the layer above keeps it until something is done.
    #[allow(clippy::result_large_err)]
    fn submit(&mut self, request: Request) -> Result<(), Request>;
    /// Hands the queued requests over.
    fn unplug(&mut self);
    /// Reports readiness of an event until [`unwatch`](Self::unwatch). The driver keeps a handle of its own.
    fn watch(&mut self, event: &Event, poller: PollerId) -> io::Result<WatchId>;
    /// Ends a watch: nothing is reported for it after this returns.
    fn unwatch(&mut self, watch: WatchId);
    /// Moves what has come to `out`.
    fn reap(&mut self, out: &mut Vec<Completion>);
    /// Sleeps until a completion, a ring of the bell, or `timeout_ns` (None: for ever).
    fn wait(&mut self, timeout_ns: Option<u64>);
    /// What other threads notify to end [`wait`](Self::wait).
    fn bell(&self) -> Event;
    /// How many submitted operations are not yet reported.
    fn outstanding(&self) -> usize;
    /// Asks the kernel to end all outstanding operations early; each still reports once.
    fn cancel_all(&mut self);
    /// Called between a poller's last look and its arming. Here the simulator lets other reactors and peers run, as other
    /// threads may; real drivers do nothing.
    fn pause(&mut self) {}
}

/// Which driver to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// io_uring where the kernel allows it, else epoll.
    Auto,
    /// io_uring or an error.
    IoUring,
    /// epoll and threads.
    Epoll,
}

/// Most operations of one driver under way at once.
pub const DEPTH: usize = 1024;

/// Opens a driver for the calling thread.
pub fn open(choice: Choice) -> io::Result<Box<dyn Driver>> {
    match choice {
        Choice::IoUring => Ok(Box::new(uring::Uring::new()?)),
        Choice::Epoll => Ok(Box::new(epoll::Epoll::new()?)),
        Choice::Auto => match uring::Uring::new() {
            Ok(driver) => Ok(Box::new(driver)),
            Err(_) => Ok(Box::new(epoll::Epoll::new()?)),
        },
    }
}

#[cfg(test)]
mod tests;
