//! What can go wrong with a bdev outside of I/O.

use qpair_memory::MemoryError;

/// Local misuse, a missing thing, or the system's refusal. Each has an errno, as SPDK's RPC shows it negated.
#[derive(Debug, thiserror::Error)]
pub enum BdevError {
    /// No bdev of that name.
    #[error("No such device: bdev {0}")]
    NoSuchBdev(String),
    /// The name, alias or UUID is taken.
    #[error("File exists: bdev {0}")]
    Exists(String),
    /// Claimed by a module, or open for something exclusive.
    #[error("Device or resource busy: bdev {name} is claimed by {owner}")]
    Claimed {
        /// The bdev.
        name: String,
        /// Who claimed it.
        owner: String,
    },
    /// It is going away.
    #[error("No such device: bdev {0} is being removed")]
    Removing(String),
    /// A parameter is out of its limits.
    #[error("Invalid argument: {field} {value}: {limit}")]
    Invalid {
        /// Which parameter.
        field: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        limit: String,
    },
    /// The device cannot do that.
    #[error("Operation not supported: {0}")]
    Unsupported(String),
    /// A reactor's I/O slab or the memory is used up.
    #[error("Cannot allocate memory: {0}")]
    NoMemory(String),
    /// No QoS group of that name.
    #[error("No such file or directory: QoS group {0}")]
    NoSuchGroup(String),
    /// The QoS group's name is taken.
    #[error("File exists: QoS group {0}")]
    GroupExists(String),
    /// Nobody enabled one.
    #[error("Bad address: bdev {0} has no histogram enabled")]
    NoHistogram(String),
    /// It did not happen in time.
    #[error("Connection timed out: {0}")]
    TimedOut(String),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// Its error.
        source: std::io::Error,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl BdevError {
    /// A parameter outside its limits.
    pub fn invalid(field: &'static str, value: impl ToString, limit: impl ToString) -> Self {
        Self::Invalid { field, value: value.to_string(), limit: limit.to_string() }
    }

    /// Positive errno.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoSuchBdev(_) | Self::Removing(_) => libc::ENODEV,
            Self::Exists(_) | Self::GroupExists(_) => libc::EEXIST,
            Self::NoSuchGroup(_) => libc::ENOENT,
            Self::NoHistogram(_) => libc::EFAULT,
            Self::Claimed { .. } => libc::EBUSY,
            Self::Invalid { .. } => libc::EINVAL,
            Self::Unsupported(_) => libc::EOPNOTSUPP,
            Self::NoMemory(_) => libc::ENOMEM,
            Self::TimedOut(_) => libc::ETIMEDOUT,
            Self::Os { source, .. } | Self::Memory(MemoryError::Os { source, .. }) => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Memory(MemoryError::TooMany { .. }) => libc::ENOSPC,
            Self::Memory(_) => libc::EINVAL,
        }
    }
}
