//! Memory that devices, guests and peers share with us: who owns it, who holds it, and how it is touched.
//!
//! How it works. A [`Mapping`] is one `mmap`: it lives until its last `Arc` goes, and then is unmapped. A
//! [`Region`] is a reactor's own handle on a mapping: cloning it is a plain, non-atomic count, so every I/O in
//! flight can hold what it touches and `munmap` follows the last one. [`GuestMemory`] translates guest and
//! front-end addresses to regions; [`Shared`] is a checked, typed window used for rings.
//!
//! Rules. Guest and shared bytes are never a Rust slice and never a reference: the other side may change
//! them at any instant. They are copied once, then checked. Every access is bounds-checked against the
//! mapping here, so the crates above need no `unsafe`.
//!
//! Errors. [`MemoryError`] names the field, the value and the limit. A mapping whose file shrank raises SIGBUS:
//! the handler of [`fault`] replaces it by zeros and marks it dead; see [`Mapping::is_dead`]. A file whose pages may never come
//! (FUSE, network file systems) is refused: [`MemoryError::MayStall`].
//!
//! Not implemented: DMA mappings for vfio (they come with the NVMe driver).
//!
//! Limits. At most [`fault::MAPPINGS_MAX`] shared mappings at once, because the signal handler walks a fixed table.

mod bitmap;
mod copy;
pub mod fault;
mod guest;
mod mapping;
mod origin;
mod region;
mod shared;

pub use bitmap::{BITMAP_PAGE, PageBitmap};
pub use guest::{GuestMemory, GuestRegion, Place};
pub use mapping::{Mapping, Pages};
pub use origin::drop_apart;
pub use region::{Region, SgList, Sge, copy_list};
pub use shared::{Shared, SharedIndex};

/// Why a piece of memory cannot be had or touched.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The range leaves its region.
    #[error("range {offset:#x}+{length:#x} leaves its region of {limit:#x} bytes")]
    OutOfRange {
        /// First byte asked for, from the start of the region.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Size of the region in bytes.
        limit: u64,
    },
    /// The address is in no region of the table.
    #[error("address {address:#x}+{length:#x} is in no memory region")]
    Unmapped {
        /// Guest or front-end address.
        address: u64,
        /// Bytes asked for.
        length: u64,
    },
    /// The address is not a multiple of what lives there.
    #[error("address {address:#x} is not a multiple of {alignment}")]
    Misaligned {
        /// Guest or front-end address, or an offset.
        address: u64,
        /// Required alignment in bytes.
        alignment: u64,
    },
    /// A memory table whose entries make no sense.
    #[error("memory region {index}: {reason}")]
    BadTable {
        /// Position in the table.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A touch of it could wait for another program or machine, for ever.
    #[error("memory on a file system of type {kind} may never answer: it must be a memfd, on tmpfs or hugetlbfs, or on a local disk")]
    MayStall {
        /// The file system's type, as mountinfo has it.
        kind: String,
    },
    /// Too many shared mappings in this process.
    #[error("more than {limit} shared mappings")]
    TooMany {
        /// [`fault::MAPPINGS_MAX`].
        limit: usize,
    },
    /// The operating system refused.
    #[error("{call}: {source}")]
    Os {
        /// The system call.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
}

impl MemoryError {
    pub(crate) fn last_os(call: &'static str) -> Self {
        Self::Os { call, source: std::io::Error::last_os_error() }
    }
}
