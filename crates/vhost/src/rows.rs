//! The rows of a memory table: mapped once for a session, seen by each of its rings' reactors.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use qpair_memory::{GuestMemory, GuestRegion, Mapping, Region, drop_apart};

use crate::VhostError;

/// Where a memory region comes from.
pub enum Source {
    /// A descriptor, to be mapped; it is closed after that.
    Fd(OwnedFd),
    /// Mapped already.
    Mapping(Arc<Mapping>),
}

/// One row of SET_MEM_TABLE.
pub struct MemoryRow {
    /// Guest-physical address.
    pub guest_address: u64,
    /// Bytes.
    pub length: u64,
    /// Address in the front end.
    pub user_address: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// What to map.
    pub source: Source,
}

/// A mapped row, kept while the session has it.
#[derive(Clone)]
pub(crate) struct MappedRow {
    guest_address: u64,
    length: u64,
    user_address: u64,
    offset: u64,
    mapping: Arc<Mapping>,
}

impl MappedRow {
    /// Maps a whole table, or nothing of it.
    pub(crate) fn of_table(rows: Vec<MemoryRow>) -> Result<Vec<Self>, VhostError> {
        let mut mapped = Vec::with_capacity(rows.len());
        let mut rows = rows.into_iter();
        while let Some(row) = rows.next() {
            let end = row
                .offset
                .checked_add(row.length)
                .ok_or_else(|| VhostError::invalid("mmap_offset", row.offset, "offset + size below 2^64"))?;
            let mapping = match row.source {
                Source::Fd(fd) => match Mapping::shared(fd.as_fd(), end) {
                    Ok(mapping) => mapping,
                    Err(error) => {
                        drop_apart((fd, rows));
                        return Err(error.into());
                    }
                },
                Source::Mapping(mapping) => mapping,
            };
            mapped.push(Self {
                guest_address: row.guest_address,
                length: row.length,
                user_address: row.user_address,
                offset: row.offset,
                mapping,
            });
        }
        GuestMemory::new(regions(&mapped))?;
        Ok(mapped)
    }
}

/// A reactor's own holds.
pub(crate) fn regions(rows: &[MappedRow]) -> Vec<GuestRegion> {
    let region = |row: &MappedRow| GuestRegion {
        guest_address: row.guest_address,
        user_address: row.user_address,
        length: row.length,
        offset: row.offset,
        region: Region::new(row.mapping.clone()),
    };
    rows.iter().map(region).collect()
}
