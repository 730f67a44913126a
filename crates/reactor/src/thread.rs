//! Reactors on threads of their own.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::driver::{self, Choice};
use crate::log::{self, Level};
use crate::{Clock, Config, Handle, Reactor, ReactorId, Turn};

/// A running reactor thread.
pub struct ReactorThread {
    handle: Handle,
    join: Option<JoinHandle<()>>,
    /// Which driver it got.
    pub driver: &'static str,
    /// The kernel's thread id.
    pub tid: i32,
}

impl ReactorThread {
    /// To reach it.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Stops the loop and waits for the thread's end.
    pub fn join(&mut self) {
        self.handle.stop();
        if let Some(join) = self.join.take()
            && join.join().is_err()
        {
            log::say(Level::Error, "reactor", format_args!("reactor {} ended by a panic", self.handle.id().0));
        }
    }
}

impl Drop for ReactorThread {
    fn drop(&mut self) {
        self.join();
    }
}

/// Starts a reactor on a thread of its own; `pin`: on the core of its number. Returns when it is ready.
pub fn spawn(id: ReactorId, config: Config, choice: Choice, pin: bool) -> io::Result<ReactorThread> {
    let (send, receive) = mpsc::channel();
    let join = std::thread::Builder::new().name(format!("reactor_{}", id.0)).spawn(move || {
        if pin && let Err(error) = pin_to(id.0) {
            let _ = send.send(Err(io::Error::new(error.kind(), format!("core {}: {error}", id.0))));
            return;
        }
        match driver::open(choice) {
            Err(error) => {
                let _ = send.send(Err(error));
            }
            Ok(driver) => {
                let name = driver.name();
                let mut reactor = Reactor::new(id, config, Clock::Monotonic, driver);
                // SAFETY: gettid has no preconditions.
                let tid = unsafe { libc::gettid() };
                let _ = send.send(Ok((reactor.handle(), name, tid)));
                run(&mut reactor);
            }
        }
    })?;
    let (handle, driver, tid) = receive.recv().map_err(|_| io::Error::other("the reactor thread ended at once"))??;
    Ok(ReactorThread { handle, join: Some(join), driver, tid })
}

/// Turns until told to stop.
pub fn run(reactor: &mut Reactor) {
    loop {
        match reactor.turn() {
            Turn::Again => {}
            Turn::Idle { until_ns } => reactor.sleep(until_ns),
            Turn::Stopped => return,
        }
    }
}

/// Keeps the calling thread on one core.
pub fn pin_to(core: u32) -> io::Result<()> {
    if core as usize >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::Error::other("no such core"));
    }
    // SAFETY: a zeroed cpu_set_t is an empty set; `core` is within its size (checked above).
    let rc = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
