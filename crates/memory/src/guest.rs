//! Address spaces: guest-physical and front-end addresses to regions.

use std::cell::Cell;

use zerocopy::FromZeros;

use crate::{MemoryError, Region, SgList, Sge};

/// One row of a memory table.
#[derive(Clone, Debug)]
pub struct GuestRegion {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// The same byte's address in the front end (vhost-user's "user address").
    pub user_address: u64,
    /// Bytes.
    pub length: u64,
    /// Where it starts in `region`.
    pub offset: u64,
    /// The hold on the mapping.
    pub region: Region,
}

/// Where something lies in one [`GuestMemory`].
#[derive(Clone, Copy, Debug, Default, FromZeros)]
pub struct Place {
    row: u32,
    /// From the start of its region.
    pub offset: u64,
}

/// A guest's memory as one reactor sees it. A new table is a new value: rings change over when they are quiet.
#[derive(Debug, Default)]
pub struct GuestMemory {
    rows: Vec<GuestRegion>,
    last: Cell<usize>,
}

impl GuestMemory {
    /// Checks the rows: none empty, none wrapping, none leaving its region, no overlap of guest addresses.
    pub fn new(mut rows: Vec<GuestRegion>) -> Result<Self, MemoryError> {
        for (index, row) in rows.iter().enumerate() {
            let bad = |reason| MemoryError::BadTable { index, reason };
            if row.length == 0 {
                return Err(bad("its size is 0"));
            }
            row.guest_address.checked_add(row.length).ok_or_else(|| bad("its guest addresses wrap"))?;
            row.user_address.checked_add(row.length).ok_or_else(|| bad("its user addresses wrap"))?;
            row.region.pointer(row.offset, row.length)?;
        }
        rows.sort_by_key(|row| row.guest_address);
        if let Some(index) = rows.windows(2).position(|w| w[0].guest_address + w[0].length > w[1].guest_address) {
            return Err(MemoryError::BadTable { index: index + 1, reason: "it overlaps the one before it" });
        }
        Ok(Self { rows, last: Cell::new(0) })
    }

    /// The rows, by rising guest address.
    pub fn rows(&self) -> &[GuestRegion] {
        &self.rows
    }

    /// Whether any region's memory vanished under us.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.rows.iter().any(|row| row.region.is_dead())
    }

    #[inline]
    fn row(&self, address: u64) -> Option<&GuestRegion> {
        let hit = |row: &&GuestRegion| address.wrapping_sub(row.guest_address) < row.length;
        if let Some(row) = self.rows.get(self.last.get()).filter(hit) {
            return Some(row);
        }
        let index = self.rows.iter().position(|row| hit(&row))?;
        self.last.set(index);
        Some(&self.rows[index])
    }

    /// Appends the pieces of `[address, address + length)` to `list`; a range may cross adjoining rows. Refused: the list
    /// is as it was.
    #[inline]
    pub fn resolve(&self, mut address: u64, length: u32, list: &mut SgList) -> Result<(), MemoryError> {
        let mut left = u64::from(length);
        let (start, before) = (address, list.len());
        let unmapped = |list: &mut SgList| {
            list.truncate(before);
            Err(MemoryError::Unmapped { address: start, length: u64::from(length) })
        };
        loop {
            let Some(row) = self.row(address) else { return unmapped(list) };
            let within = address - row.guest_address;
            let step = left.min(row.length - within);
            list.push(Sge { region: row.region.clone(), offset: row.offset + within, length: step as u32 });
            left -= step;
            if left == 0 {
                return Ok(());
            }
            let Some(next) = address.checked_add(step) else { return unmapped(list) };
            address = next;
        }
    }

    /// One contiguous piece at a guest address: its region and offset. For headers, statuses and indirect tables.
    #[inline]
    pub fn find(&self, address: u64, length: u64) -> Result<(&Region, u64), MemoryError> {
        let row = self.row(address).filter(|row| length <= row.length - (address - row.guest_address));
        row.map(|row| (&row.region, row.offset + (address - row.guest_address))).ok_or(MemoryError::Unmapped { address, length })
    }

    /// As [`find`](Self::find), where the row hit last is the likely one and a miss is no error yet.
    #[inline]
    pub fn likely(&self, address: u64, length: u64) -> Option<(&Region, Place)> {
        let index = self.last.get();
        let row = self.rows.get(index)?;
        let within = address.wrapping_sub(row.guest_address);
        if within >= row.length || length > row.length - within {
            return None;
        }
        Some((&row.region, Place { row: index as u32, offset: row.offset.wrapping_add(within) }))
    }

    /// As [`find`](Self::find), but names the row, so that the place can be kept without a hold: [`at`](Self::at).
    #[inline]
    pub fn place(&self, address: u64, length: u64) -> Result<Place, MemoryError> {
        let row = self.row(address).filter(|row| length <= row.length - (address - row.guest_address));
        let row = row.ok_or(MemoryError::Unmapped { address, length })?;
        Ok(Place { row: self.last.get() as u32, offset: row.offset + (address - row.guest_address) })
    }

    /// The region and offset of a place of this table.
    #[inline]
    pub fn at(&self, place: Place) -> (&Region, u64) {
        (&self.rows[place.row as usize].region, place.offset)
    }

    /// The guest address of a piece that [`resolve`](Self::resolve) or [`likely`](Self::likely) of this table gave. None: it is of another.
    pub fn guest_address(&self, piece: &Sge) -> Option<u64> {
        let here = |row: &&GuestRegion| row.region.is(&piece.region) && piece.offset.wrapping_sub(row.offset) < row.length;
        let likely = self.rows.get(self.last.get()).filter(here);
        let row = likely.or_else(|| self.rows.iter().find(here))?;
        Some(row.guest_address + (piece.offset - row.offset))
    }

    /// The guest address of a place of this table.
    #[inline]
    pub fn guest_address_at(&self, place: Place) -> u64 {
        let row = &self.rows[place.row as usize];
        row.guest_address.wrapping_add(place.offset.wrapping_sub(row.offset))
    }

    /// The guest address of a front-end address.
    pub fn guest_address_of_user(&self, address: u64) -> Option<u64> {
        let row = self.rows.iter().find(|row| address.wrapping_sub(row.user_address) < row.length)?;
        Some(row.guest_address + (address - row.user_address))
    }

    /// As [`find`](Self::find), by front-end address. For ring addresses, which come once.
    pub fn find_user(&self, address: u64, length: u64) -> Result<(&Region, u64), MemoryError> {
        let row = self.rows.iter().find(|row| {
            let within = address.wrapping_sub(row.user_address);
            within < row.length && length <= row.length - within
        });
        row.map(|row| (&row.region, row.offset + (address - row.user_address))).ok_or(MemoryError::Unmapped { address, length })
    }
}
