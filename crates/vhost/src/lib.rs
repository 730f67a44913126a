//! vhost-user-blk, the device's side: controllers, sessions and the rings they run.
//!
//! Virtio 1.2 (2.7 split virtqueues, 2.8 packed virtqueues, 5.2 block device) and the vhost-user protocol of QEMU's documentation.
//!
//! How it works. A [`Target`] holds controllers: a bdev seen as a virtio-blk device. Python owns the socket and decodes
//! its messages; each becomes a [`Command`] to a session. A [`session`] lives on its controller's home reactor and
//! executes commands one after the other; its rings live on the reactors they were spread over. A ring is a
//! poller ([`queue`]): it takes requests from the guest's memory ([`ring`], [`split`], [`packed`], [`request`]), submits them in batches,
//! and puts what is done back. A command that promises quiet (GET_VRING_BASE, a new memory table, reset, close) is
//! answered only after every ring concerned has drained, on its own reactor, and has let go of the memory.
//!
//! The guest is hostile: descriptors and headers are copied once, then checked. Whatever breaks the rules ends its queue
//! by name ([`Broken`]); the other queues, sessions and disks go on.
//!
//! A bdev that goes while a session lives leaves the session as it is: its rings, also those that start later, answer with errors. What of a controller
//! may change under a session ([`Change`]: the reactors of its rings, their coalescing) is a command as any other, for which all rings stop and start.
//!
//! Errors. [`VhostError`] for commands that cannot be done; [`Broken`] for what a ring's driver did.
//!
//! Memory regions that come and go one by one, and backend requests, are Python's.
//!
//! Limits: [`QUEUES_MAX`] queues a controller, 32768 entries a queue, [`request::SEGMENTS_MAX`] data segments a request.

#![forbid(unsafe_code)]

mod coalesce;
mod config;
mod inflight;
mod log;
mod packed;
mod park;
mod queue;
pub mod request;
pub mod ring;
mod rows;
mod session;
mod split;
mod stats;
mod target;

pub use coalesce::Coalescing;
pub use config::{features, serial};
pub use inflight::Inflight;
pub use packed::PackedRing;
pub use rows::{MemoryRow, Source};
pub use session::{Answer, Command};
pub use split::SplitRing;
pub use stats::{QueueState, QueueStats};
pub use target::{Change, Controller, ControllerInfo, Failure, Options, QueueInfo, Reply, SessionInfo, Target};

/// Most queues of one controller.
pub const QUEUES_MAX: u32 = 256;

/// Where a ring's three areas lie, as front-end addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Descriptor table.
    pub desc: u64,
    /// Avail ring; of a packed ring the driver's event suppression.
    pub avail: u64,
    /// Used ring; of a packed ring the device's event suppression.
    pub used: u64,
    /// Where in the dirty log the used area is marked from, if it is (VHOST_VRING_F_LOG).
    pub log: Option<u64>,
}

/// A rule of the ring that its driver broke. Ends the queue.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// More new entries than the ring has.
    #[error("avail index {index} is {ahead} entries ahead of {next}, the ring has {size}")]
    AvailJumped {
        /// As read.
        index: u16,
        /// Expected next.
        next: u16,
        /// Difference.
        ahead: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor number outside the table.
    #[error("descriptor {index} is outside the table of {size}")]
    BadIndex {
        /// As read.
        index: u32,
        /// Table size.
        size: u32,
    },
    /// A chain that never ends, or is longer than the ring.
    #[error("the chain at {head} has more than {limit} descriptors")]
    TooLong {
        /// First descriptor.
        head: u16,
        /// Most allowed.
        limit: u32,
    },
    /// A buffer of no bytes.
    #[error("descriptor {index} of the chain at {head} has length 0")]
    Empty {
        /// First descriptor.
        head: u16,
        /// Position in the chain.
        index: u32,
    },
    /// A buffer outside all regions.
    #[error("descriptor {index} of the chain at {head}: {address:#x}+{length:#x} is in no memory region")]
    Unmapped {
        /// First descriptor.
        head: u16,
        /// Position in the chain.
        index: u32,
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// Indirect where it may not be, or of an impossible size.
    #[error("the chain at {head}: {reason}")]
    BadIndirect {
        /// First descriptor.
        head: u16,
        /// What is wrong.
        reason: &'static str,
    },
    /// A buffer to read after one to write.
    #[error("descriptor {index} of the chain at {head} is for reading but follows one for writing")]
    WrongOrder {
        /// First descriptor.
        head: u16,
        /// Position in the chain.
        index: u32,
    },
    /// Too short for a header, or no place for the status.
    #[error("the request at {head}: {what} has {bytes} bytes, at least {least} are needed")]
    TooShort {
        /// First descriptor.
        head: u16,
        /// Which part.
        what: &'static str,
        /// As given.
        bytes: u64,
        /// Needed.
        least: u64,
    },
    /// The same chain twice.
    #[error("the chain at {head} was made available again while it is in flight")]
    InFlight {
        /// First descriptor.
        head: u16,
    },
    /// A packed ring's driver makes more available than is free.
    #[error("descriptor {index} was made available while all {size} of the ring are in flight")]
    Overrun {
        /// Index on the ring.
        index: u16,
        /// Ring size.
        size: u16,
    },
    /// Wrap bits that lie, in a packed ring.
    #[error("descriptor {index} of the chain at {head} is not available by its wrap bits, though the chain goes on there")]
    NotAvailable {
        /// First descriptor.
        head: u16,
        /// Index on the ring.
        index: u16,
    },
    /// A buffer id outside the ring, in a packed ring.
    #[error("the chain at {head} has buffer id {id}, the ring has {size}")]
    BadId {
        /// First descriptor.
        head: u16,
        /// As read.
        id: u16,
        /// Ring size.
        size: u16,
    },
    /// A buffer id that is in use, in a packed ring.
    #[error("the chain at {head} has buffer id {id}, which is in flight")]
    IdInFlight {
        /// First descriptor.
        head: u16,
        /// As read.
        id: u16,
    },
    /// Guest memory went away (its file shrank).
    #[error("guest memory vanished: its file was truncated")]
    MemoryVanished,
    /// The dirty log has no room for a page that the device would write to.
    #[error("the chain at {head}: {address:#x}+{length:#x} is outside the dirty log, which ends at {end:#x}")]
    Unlogged {
        /// First descriptor.
        head: u16,
        /// Guest address.
        address: u64,
        /// Bytes.
        length: u64,
        /// Where the log ends.
        end: u64,
    },
    /// The dirty log went away (its file shrank).
    #[error("the dirty log vanished: its file was truncated")]
    LogVanished,
    /// The inflight region contradicts itself or the ring.
    #[error("inflight region: {0}")]
    Inflight(String),
    /// Our own fault.
    #[error("internal: {0}")]
    Internal(String),
}

/// A command that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// No such controller or session.
    #[error("No such device: {0}")]
    NoSuch(String),
    /// The name is taken.
    #[error("File exists: controller {0}")]
    Exists(String),
    /// There is a session already, or one that holds the controller.
    #[error("Device or resource busy: {0}")]
    Busy(String),
    /// A field is out of its limits.
    #[error("Invalid argument: {field} {value}: {limit}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// As given.
        value: String,
        /// What it must be.
        limit: String,
    },
    /// Not in this state.
    #[error("Invalid argument: {0}")]
    State(String),
    /// A bdev problem.
    #[error(transparent)]
    Bdev(#[from] qpair_bdev::BdevError),
    /// A memory problem.
    #[error(transparent)]
    Memory(#[from] qpair_memory::MemoryError),
    /// The driver broke a rule.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// The operating system refused.
    #[error("{0}: {1}")]
    Os(&'static str, std::io::Error),
}

impl Broken {
    /// Whether it ends the session, and not the ring alone.
    pub fn ends_session(&self) -> bool {
        matches!(self, Self::MemoryVanished | Self::LogVanished)
    }
}

impl VhostError {
    /// A field outside its limits.
    pub fn invalid(field: &'static str, value: impl ToString, limit: impl ToString) -> Self {
        Self::Invalid { field, value: value.to_string(), limit: limit.to_string() }
    }

    /// Positive errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoSuch(_) => libc::ENODEV,
            Self::Exists(_) => libc::EEXIST,
            Self::Busy(_) => libc::EBUSY,
            Self::Bdev(error) => error.errno(),
            Self::Os(_, error) => error.raw_os_error().unwrap_or(libc::EIO),
            Self::Memory(qpair_memory::MemoryError::Os { source, .. }) => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Invalid { .. } | Self::State(_) | Self::Memory(_) | Self::Broken(_) => libc::EINVAL,
        }
    }
}
