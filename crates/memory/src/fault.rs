//! SIGBUS: memory that a peer shrinks under our feet.
//!
//! A shared mapping whose file was truncated faults on access. The handler finds the mapping in a fixed table,
//! maps zeros over all of it and marks it dead; the access is then repeated and reads zeros. Whoever polls the
//! rings looks at the mark and ends the session. A SIGBUS anywhere else goes to whoever had the signal before.
//!
//! Why this is safe in a signal handler: it walks a static table of atomics and calls `mmap`, which is a bare
//! system call. Why no mapping can go while the handler works on it: the faulting thread holds it.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use crate::MemoryError;

/// How many shared mappings a process may have: 8 regions for each of 512 sessions.
pub const MAPPINGS_MAX: usize = 4096;

struct Entry {
    /// 0 is free, 1 is being filled, else the address.
    base: AtomicUsize,
    length: AtomicUsize,
    dead: AtomicBool,
}

static TABLE: [Entry; MAPPINGS_MAX] =
    [const { Entry { base: AtomicUsize::new(0), length: AtomicUsize::new(0), dead: AtomicBool::new(false) } }; MAPPINGS_MAX];
static INSTALL: Once = Once::new();
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// A mapping's place in the table.
#[derive(Debug)]
pub(crate) struct Slot(usize);

impl Slot {
    pub(crate) fn register(base: usize, length: usize) -> Result<Self, MemoryError> {
        INSTALL.call_once(install);
        for (index, entry) in TABLE.iter().enumerate() {
            if entry.base.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                entry.length.store(length, Ordering::Release);
                entry.dead.store(false, Ordering::Relaxed);
                entry.base.store(base, Ordering::Release);
                return Ok(Self(index));
            }
        }
        Err(MemoryError::TooMany { limit: MAPPINGS_MAX })
    }

    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        TABLE[self.0].dead.load(Ordering::Relaxed)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        TABLE[self.0].base.store(0, Ordering::Release);
    }
}

fn install() {
    // SAFETY: zeroed sigactions are valid values; the handler has the SA_SIGINFO signature; the previous action is
    // leaked on purpose, so that the handler may read it at any time.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        let previous: &'static mut libc::sigaction = Box::leak(Box::new(std::mem::zeroed()));
        if libc::sigaction(libc::SIGBUS, &action, previous) == 0 {
            PREVIOUS.store(previous, Ordering::Release);
        }
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let address = unsafe { (*info).si_addr() } as usize;
    for entry in &TABLE {
        let base = entry.base.load(Ordering::Acquire);
        let length = entry.length.load(Ordering::Acquire);
        // Looked at again: else an entry that changes hands right now could pair the old base with the new length.
        let ours = base > 1 && entry.base.load(Ordering::Relaxed) == base;
        if ours && address >= base && address - base < length && replace_by_zeros(base, length) {
            entry.dead.store(true, Ordering::Release);
            return;
        }
    }
    pass_on(signal, info, context);
}

fn replace_by_zeros(base: usize, length: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the range is a live mapping of ours (it is in the table, and the faulting thread holds it), so
    // MAP_FIXED replaces nothing else.
    unsafe { libc::mmap(base as *mut libc::c_void, length, protection, flags, -1, 0) != libc::MAP_FAILED }
}

fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: `previous` is null or the leaked sigaction, never written after it was published. A handler in it
    // has the signature that its flags say. Restoring the default makes the repeated access end the process.
    unsafe {
        let handler = if previous.is_null() { libc::SIG_DFL } else { (*previous).sa_sigaction };
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            libc::signal(signal, libc::SIG_DFL);
        } else if (*previous).sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(handler);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
            handler(signal);
        }
    }
}
