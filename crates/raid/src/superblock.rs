//! Superblocks on members: reading one, and writing an array's to all that have it.
//!
//! Members are written one after the other, each flushed before the next: a power cut tears one at most.

use std::sync::Arc;

use qpair_bdev::{BdevError, Descriptor};
use qpair_memory::{Mapping, Pages, Region};
use qpair_reactor::log::{self, Level as Severity};
use qpair_wire::raid_superblock::{Base, Error, Header, LENGTH_MAX, decode, encode};
use zerocopy::little_endian::{U32, U64};

use crate::array::{Array, lock};
use crate::mask::Mask;
use crate::worker::Worker;

/// One as read.
#[derive(Clone, Debug)]
pub(crate) struct Superblock {
    pub header: Header,
    pub bases: Vec<Base>,
}

/// What is at the start of a bdev.
#[derive(Debug)]
pub(crate) enum Found {
    Superblock(Box<Superblock>),
    /// No superblock, or one that is refused.
    Nothing,
}

fn memory(bytes: u64) -> Result<Region, BdevError> {
    Ok(Region::new(Mapping::anonymous(bytes as usize, Pages::Normal)?))
}

fn failed(name: &str, what: &str, status: qpair_bdev::Status) -> BdevError {
    let source = std::io::Error::from_raw_os_error(libc::EIO);
    BdevError::Os { what: format!("{what} the superblock of bdev {name} ended with {status:?}"), source }
}

/// Looks for a superblock at the start of a bdev.
pub(crate) async fn load(worker: &Worker, base: &Arc<Descriptor>) -> Result<Found, BdevError> {
    let name = base.name().to_owned();
    let info = base.info().ok_or_else(|| BdevError::Removing(name.clone()))?;
    let block = u64::from(info.block_size);
    let line = worker.line(base).await?;
    let mut bytes = (size_of::<Header>() as u64).next_multiple_of(block);
    loop {
        if bytes / block > info.num_blocks {
            return Ok(Found::Nothing);
        }
        let region = memory(bytes)?;
        let status = line.read(0, bytes / block, &region).await;
        if status.is_error() {
            return Err(failed(&name, "reading", status));
        }
        let mut copy = vec![0; bytes as usize];
        region.read(0, &mut copy)?;
        match decode(&copy) {
            Ok((header, bases)) => return Ok(Found::Superblock(Box::new(Superblock { header: *header, bases: bases.to_vec() }))),
            Err(Error::Short { needed, .. }) if needed > copy.len() && needed <= LENGTH_MAX => {
                bytes = (needed as u64).next_multiple_of(block)
            }
            Err(Error::Signature) => return Ok(Found::Nothing),
            Err(error) => {
                log::say(Severity::Warning, "raid", format_args!("the superblock of bdev {name} is refused: {error}"));
                return Ok(Found::Nothing);
            }
        }
    }
}

/// Writes the same blocks to the start of a member, on stable media when done.
async fn store(worker: &Worker, base: &Arc<Descriptor>, region: &Region) -> Result<(), BdevError> {
    let name = base.name();
    let info = base.info().ok_or_else(|| BdevError::Removing(name.to_owned()))?;
    let line = worker.line(base).await?;
    let status = line.write(0, region.len() / u64::from(info.block_size), region).await;
    if status.is_error() {
        return Err(failed(name, "writing", status));
    }
    let status = line.flush().await;
    if status.is_error() { Err(failed(name, "flushing", status)) } else { Ok(()) }
}

impl Array {
    /// The superblock, padded to whole write units.
    fn superblock_now(&self) -> Result<Region, BdevError> {
        let state = lock(&self.state);
        let mut header = Header { uuid: self.uuid.into_bytes(), num_base_bdevs: self.slots as u8, ..Header::default() };
        let name = self.name.as_bytes();
        header.name[..name.len()].copy_from_slice(name);
        (header.raid_size, header.block_size, header.level) =
            (U64::new(state.num_blocks), U32::new(state.block_size), U32::new(self.level.0));
        header.strip_size = U32::new(self.strip_blocks(state.block_size));
        header.seq_number = U64::new(state.sequence);
        let mut bases = Vec::with_capacity(self.slots);
        for slot in &state.slots {
            if let Some(entry) = slot.entry {
                bases.push(Base { data_size: U64::new(slot.data_size), ..entry });
            }
        }
        let mut bytes = vec![0; LENGTH_MAX];
        let length = encode(&header, &bases, &mut bytes).map_err(|error| BdevError::invalid("superblock", &self.name, error))?;
        let units = state.slots.iter().filter_map(|slot| Some(slot.member.as_ref()?.info()?.write_unit_blocks)).max().unwrap_or(1);
        let padded = (length as u64).next_multiple_of(u64::from(state.block_size) * u64::from(units));
        drop(state);
        let region = memory(padded)?;
        region.write(0, &bytes[..length])?;
        Ok(region)
    }

    /// Writes a superblock with the next sequence number to those members; which of them failed.
    pub(crate) async fn write_superblocks(&self, worker: &Worker, to: Mask) -> Mask {
        lock(&self.state).sequence += 1;
        self.write_same(worker, to).await
    }

    /// As [`write_superblocks`](Self::write_superblocks), to members that are to have what the others have.
    pub(crate) async fn write_same(&self, worker: &Worker, to: Mask) -> Mask {
        let region = match self.superblock_now() {
            Ok(region) => region,
            Err(error) => {
                log::say(Severity::Error, "raid", format_args!("{}: {error}", self.name));
                return to;
            }
        };
        let mut failed = Mask::EMPTY;
        for slot in to.slots() {
            let member = lock(&self.state).slots[slot].member.clone();
            let outcome = match &member {
                Some(member) => store(worker, member, &region).await,
                None => Err(BdevError::Removing(self.name.clone())),
            };
            if let Err(error) = outcome {
                log::say(Severity::Error, "raid", format_args!("{}: slot {slot}: {error}", self.name));
                self.blame(Mask::of(slot), &error.to_string());
                failed = failed | Mask::of(slot);
            }
        }
        failed
    }

    /// Zeros where superblocks were.
    pub(crate) async fn clear_superblocks(&self, worker: &Worker) {
        let (members, bytes) = {
            let state = lock(&self.state);
            let members: Vec<_> = state.slots.iter().filter_map(|slot| slot.member.clone()).collect();
            let length = (size_of::<Header>() + self.slots * size_of::<Base>()) as u64;
            (members, length.next_multiple_of(u64::from(state.block_size.max(512))))
        };
        for member in &members {
            let unit = member.info().map_or(1, |info| u64::from(info.write_unit_blocks) * u64::from(info.block_size));
            let outcome = match memory(bytes.next_multiple_of(unit)) {
                Ok(zeros) => store(worker, member, &zeros).await,
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                log::say(Severity::Error, "raid", format_args!("{}: {error}", self.name));
            }
        }
    }
}
