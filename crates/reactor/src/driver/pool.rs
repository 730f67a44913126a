//! A few threads that do the epoll driver's file operations.
//!
//! The reactor never blocks here: both queues are lock-free and as long as there are slots. Threads wait on an
//! eventfd that counts jobs, so a batch of jobs costs one write; a thread that has finished one rings the reactor only if
//! that sleeps, by the protocol of [`crate::doorbell`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_queue::ArrayQueue;

use super::slots::Job;
use super::{DEPTH, FileOp};
use crate::doorbell::Doorbell;
use crate::event::Event;

/// Threads of one reactor's pool.
const THREADS: usize = 4;

struct Shared {
    jobs: ArrayQueue<Job>,
    /// An eventfd in semaphore mode: how many jobs were queued.
    count: File,
    results: ArrayQueue<(u32, i32)>,
    doorbell: Doorbell,
    bell: Event,
    stop: AtomicBool,
}

/// The threads. Dropped: jobs not begun are forgotten, those begun are waited for.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The process that has these threads: a forked child has none, and must not wait for them.
    process: u32,
}

impl Pool {
    /// Starts the threads; `bell` is rung when a result came while the reactor slept.
    pub fn start(bell: Event) -> io::Result<Self> {
        // SAFETY: eventfd has no preconditions.
        let count = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_SEMAPHORE) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        let count = unsafe { File::from_raw_fd(count) };
        let (jobs, results) = (ArrayQueue::new(DEPTH), ArrayQueue::new(DEPTH));
        let shared = Shared { jobs, count, results, doorbell: Doorbell::default(), bell, stop: AtomicBool::new(false) };
        let mut pool = Self { shared: Arc::new(shared), threads: Vec::new(), process: std::process::id() };
        for number in 0..THREADS {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new().name(format!("file_io_{number}"));
            pool.threads.push(builder.spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    /// Queues the jobs and wakes as many threads. There are never more jobs than slots, so they fit.
    pub fn give(&self, jobs: impl Iterator<Item = Job>) {
        let mut count = 0u64;
        for job in jobs {
            if let Err(job) = self.shared.jobs.push(job) {
                let _ = self.shared.results.push((job.slot, -libc::EAGAIN));
            }
            count += 1;
        }
        self.shared.add(count);
    }

    /// One finished job: its slot and result.
    #[inline]
    pub fn result(&self) -> Option<(u32, i32)> {
        self.shared.results.pop()
    }

    /// Takes back a job that no thread has begun.
    pub fn take_back(&self) -> Option<Job> {
        self.shared.jobs.pop()
    }

    /// Runs `wait` unless a result is there; a result that comes meanwhile rings the bell.
    pub fn sleep(&self, wait: impl FnOnce()) {
        if self.shared.doorbell.may_sleep(|| self.shared.results.is_empty()) {
            wait();
            self.shared.doorbell.awake();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            return std::mem::forget(std::mem::take(&mut self.threads));
        }
        while self.take_back().is_some() {}
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.add(self.threads.len() as u64);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn add(&self, count: u64) {
        let mut writer: &File = &self.count;
        while matches!(writer.write(&count.to_ne_bytes()), Err(error) if error.kind() == io::ErrorKind::Interrupted) {}
    }

    fn work(&self) {
        block_signals();
        let mut reader: &File = &self.count;
        loop {
            match reader.read(&mut [0u8; 8]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // None: it was taken back.
            let Some(job) = self.jobs.pop() else { continue };
            let result = run(&job);
            // As many places as slots, so there is one; nothing of the job is touched from here on.
            let _ = self.results.push((job.slot, result));
            if self.doorbell.must_ring() {
                self.bell.notify();
            }
        }
    }
}

/// The system call, repeated while a signal interrupts it: bytes or a negative errno.
fn run(job: &Job) -> i32 {
    let (offset, length, count) = (job.offset as libc::off64_t, job.length as libc::off64_t, job.count as i32);
    loop {
        // SAFETY: the iovecs and what they lead to are held by the job's slot until its result is taken, and so is the
        // descriptor.
        let result = unsafe {
            match job.op {
                FileOp::Read => libc::preadv64(job.fd, job.iovecs, count, offset),
                FileOp::Write => libc::pwritev64(job.fd, job.iovecs, count, offset),
                FileOp::WriteDurable => libc::pwritev2(job.fd, job.iovecs, count, offset, libc::RWF_DSYNC),
                FileOp::Sync => libc::fdatasync(job.fd) as isize,
                FileOp::Punch => allocate(job.fd, libc::FALLOC_FL_PUNCH_HOLE, offset, length),
                FileOp::Zero => allocate(job.fd, libc::FALLOC_FL_ZERO_RANGE, offset, length),
            }
        };
        if result >= 0 {
            return result as i32;
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            errno => return -errno.unwrap_or(libc::EIO),
        }
    }
}

/// # Safety
/// None beyond an open descriptor.
unsafe fn allocate(fd: i32, mode: i32, offset: libc::off64_t, length: libc::off64_t) -> isize {
    // SAFETY: a plain system call on numbers.
    unsafe { libc::fallocate64(fd, mode | libc::FALLOC_FL_KEEP_SIZE, offset, length) as isize }
}

/// Signals are for threads that know what to do with them.
fn block_signals() {
    // SAFETY: the set is initialised by sigfillset before it is used; faults of this thread are never blocked.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        for fault in [libc::SIGBUS, libc::SIGSEGV, libc::SIGFPE, libc::SIGILL] {
            libc::sigdelset(&mut set, fault);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}
