//! Notifications between parties: an eventfd, or its counterpart in the simulator.
//!
//! A vhost kick, a vhost call and a reactor's own bell are all this: `notify` never blocks, whatever a peer does to its eventfd, and a reactor that
//! watches it is woken once or more for any number of notifications.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that can be waited for.
#[derive(Debug)]
pub struct Event(Kind);

#[derive(Debug)]
enum Kind {
    Fd(File),
    /// Shared with a peer, who can make a write to it wait.
    Foreign(File),
    Simulated(Arc<Simulation>),
}

#[derive(Debug, Default)]
struct Simulation {
    count: AtomicU64,
    /// Notifications ever: what edge-triggered watches compare, since the count falls back when it is taken.
    edges: AtomicU64,
}

impl Event {
    /// A new eventfd.
    pub fn new() -> std::io::Result<Self> {
        // SAFETY: eventfd has no preconditions.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(Self(Kind::Fd(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))))
    }

    /// Somebody else's eventfd. A peer must not stall a reactor: see `signal`.
    pub fn from_fd(fd: OwnedFd) -> Self {
        // SAFETY: plain fcntl calls on a descriptor we own; failure leaves it as it was.
        unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
        Self(Kind::Foreign(File::from(fd)))
    }

    /// A simulated one; clones made by [`Event::twin`] share the count.
    pub fn simulated() -> Self {
        Self(Kind::Simulated(Arc::default()))
    }

    /// Another handle on the same event.
    pub fn twin(&self) -> std::io::Result<Self> {
        Ok(Self(match &self.0 {
            Kind::Fd(file) => Kind::Fd(file.try_clone()?),
            Kind::Foreign(file) => Kind::Foreign(file.try_clone()?),
            Kind::Simulated(simulation) => Kind::Simulated(simulation.clone()),
        }))
    }

    /// Adds one. A full counter, or a descriptor that is no eventfd and refuses, changes nothing.
    pub fn notify(&self) {
        match &self.0 {
            Kind::Fd(file) => {
                let mut writer: &File = file;
                let _ = writer.write(&1u64.to_ne_bytes());
            }
            Kind::Foreign(file) => crate::signal::signal(file.as_fd()),
            Kind::Simulated(simulation) => {
                simulation.count.fetch_add(1, Ordering::SeqCst);
                simulation.edges.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Takes the count, 0 if there was none. Not for a peer's eventfd on a reactor: whether this waits is up to the peer.
    pub fn take(&self) -> u64 {
        match &self.0 {
            Kind::Fd(file) | Kind::Foreign(file) => {
                let mut bytes = [0u8; 8];
                let mut reader: &File = file;
                match reader.read(&mut bytes) {
                    Ok(8) => u64::from_ne_bytes(bytes),
                    _ => 0,
                }
            }
            Kind::Simulated(simulation) => simulation.count.swap(0, Ordering::SeqCst),
        }
    }

    /// The descriptor, unless simulated.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.0 {
            Kind::Fd(file) | Kind::Foreign(file) => Some(file.as_fd()),
            Kind::Simulated(_) => None,
        }
    }

    /// How many notifications there ever were, unless real. For simulated drivers.
    pub fn edges(&self) -> Option<u64> {
        match &self.0 {
            Kind::Fd(_) | Kind::Foreign(_) => None,
            Kind::Simulated(simulation) => Some(simulation.edges.load(Ordering::SeqCst)),
        }
    }
}
