//! Requests under way: each is held, with its memory and its file, until the kernel is done with it.

use std::os::fd::{AsRawFd, RawFd};

use super::{Completion, DEPTH, FileOp, FileRef, Request};

/// Linux's IOV_MAX.
const ENTRIES_MAX: usize = 1024;

#[derive(Default)]
struct Slot {
    request: Option<Request>,
    /// Kept with the slot: its heap space serves the next request too.
    iovecs: Vec<libc::iovec>,
}

/// A slab of requests, at most [`DEPTH`].
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

/// What became of a request that was put in.
pub(super) enum Inserted {
    /// It is in this slot.
    At(u32),
    /// It cannot be begun: report this.
    Refused(Completion),
}

/// The system call that a request asks for. What it points to lives as long as its slot is taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub slot: u32,
    pub op: FileOp,
    pub fd: RawFd,
    pub offset: u64,
    pub length: u64,
    pub iovecs: *const libc::iovec,
    pub count: u32,
}

// SAFETY: the pointers lead to memory that the slot's request holds, and the slot is not given up before the job's
// result is back; the kernel, not Rust code, follows them.
unsafe impl Send for Job {}

impl Default for Slots {
    fn default() -> Self {
        Self { slots: Vec::with_capacity(DEPTH), free: Vec::with_capacity(DEPTH) }
    }
}

impl Slots {
    /// How many are taken.
    #[inline]
    pub fn taken(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Puts a request in; gives it back when all slots are taken.
    #[allow(clippy::result_large_err)]
    #[inline]
    pub fn insert(&mut self, request: Request) -> Result<Inserted, Request> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() == DEPTH => return Err(request),
            None => {
                self.slots.push(Slot::default());
                (self.slots.len() - 1) as u32
            }
        };
        let slot = &mut self.slots[index as usize];
        if let Err(errno) = prepare(&request, &mut slot.iovecs) {
            self.free.push(index);
            return Ok(Inserted::Refused(Completion::Done { poller: request.poller, value: request.value, result: -errno }));
        }
        slot.request = Some(request);
        Ok(Inserted::At(index))
    }

    /// What to do for the request in `slot`, which must be taken.
    #[inline]
    pub fn job(&self, slot: u32) -> Option<Job> {
        let Slot { request, iovecs } = self.slots.get(slot as usize)?;
        let request = request.as_ref()?;
        let FileRef::Real(file) = &request.file else { return None };
        let (iovecs, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        Some(Job { slot, op: request.op, fd: file.as_raw_fd(), offset: request.offset, length: request.length, iovecs, count })
    }

    /// Frees the slot; the report of its end.
    #[inline]
    pub fn finish(&mut self, slot: u32, result: i32) -> Option<Completion> {
        let request = self.slots.get_mut(slot as usize)?.request.take()?;
        self.free.push(slot);
        Some(Completion::Done { poller: request.poller, value: request.value, result })
    }

    /// The slots that are taken.
    pub fn indices(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.request.is_some()).map(|(index, _)| index as u32)
    }
}

/// Checks a request and writes its iovecs; the error is an errno.
#[inline]
fn prepare(request: &Request, iovecs: &mut Vec<libc::iovec>) -> Result<(), i32> {
    iovecs.clear();
    if !matches!(request.file, FileRef::Real(_)) {
        return Err(libc::EBADF);
    }
    // A negative offset would mean "where the file stands" to io_uring.
    if request.offset.checked_add(request.length).is_none_or(|end| end > i64::MAX as u64) {
        return Err(libc::EINVAL);
    }
    if !matches!(request.op, FileOp::Read | FileOp::Write | FileOp::WriteDurable) {
        return Ok(());
    }
    if request.list.len() > ENTRIES_MAX {
        return Err(libc::EINVAL);
    }
    for entry in &request.list {
        let base = entry.region.pointer(entry.offset, u64::from(entry.length)).map_err(|_| libc::EFAULT)?;
        iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: entry.length as usize });
    }
    Ok(())
}
