//! Simulated files behind a write-back cache.
//!
//! A write that completed is in the cache: reads see it, a process that dies does not lose it, a power cut may. Each
//! sector of 512 bytes keeps all contents it had since it was last flushed, and a power cut leaves any of them, each
//! sector for itself: that is every legal outcome of reordering and tearing at sector granularity. A flush covers what
//! was in the cache when the flush was *submitted*, no more, so that a layer that flushes too early is found out.
//!
//! Not implemented: a size that is lost with the cut; a file's size is durable at once.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::Rng;
use crate::driver::FileRef;

/// Largest simulated file in bytes: beyond it a write fails with EFBIG.
pub const SIZE_MAX: u64 = 1 << 30;
/// Bytes that are never torn.
pub const SECTOR: usize = 512;

type Sector = [u8; SECTOR];

#[derive(Debug, Default)]
struct SimFile {
    size: u64,
    /// What reads see, in whole sectors.
    current: Vec<u8>,
    /// What a power cut leaves at least.
    durable: Vec<u8>,
    /// Contents written since, oldest first, by sector.
    versions: BTreeMap<u64, Vec<(u64, Sector)>>,
    sequence: u64,
    gone: Option<i32>,
}

/// All simulated files. Clones are the same files.
#[derive(Clone, Debug, Default)]
pub struct Disk(Rc<RefCell<Vec<SimFile>>>);

impl Disk {
    /// A new file of `size` zeroed bytes.
    pub fn create(&self, size: u64) -> FileRef {
        let mut files = self.0.borrow_mut();
        let mut file = SimFile::default();
        file.resize(size);
        files.push(file);
        FileRef::Simulated(files.len() as u32 - 1)
    }

    fn with<R>(&self, file: &FileRef, run: impl FnOnce(&mut SimFile) -> R) -> Result<R, i32> {
        let FileRef::Simulated(number) = file else { return Err(libc::EBADF) };
        let mut files = self.0.borrow_mut();
        let file = files.get_mut(*number as usize).ok_or(libc::EBADF)?;
        match file.gone {
            Some(errno) => Err(errno),
            None => Ok(run(file)),
        }
    }

    /// From here on everything on the file fails with `errno`, also what is under way.
    pub fn vanish(&self, file: &FileRef, errno: i32) {
        let _ = self.with(file, |file| file.gone = Some(errno));
    }

    /// The size in bytes.
    pub fn size(&self, file: &FileRef) -> Result<u64, i32> {
        self.with(file, |file| file.size)
    }

    /// Sets the size; what is cut off is gone, what is added reads as zeros.
    pub fn resize(&self, file: &FileRef, size: u64) -> Result<(), i32> {
        self.with(file, |file| file.resize(size))
    }

    /// What reads see; shorter at the end of the file. The error is an errno.
    pub fn read(&self, file: &FileRef, offset: u64, length: u64) -> Result<Vec<u8>, i32> {
        self.with(file, |file| {
            let end = offset.saturating_add(length).min(file.size);
            file.current.get(offset as usize..end as usize).map(<[u8]>::to_vec).unwrap_or_default()
        })
    }

    /// Writes the sectors that `choose` admits; `durable`: past the cache. Grows the file.
    pub fn write(&self, file: &FileRef, offset: u64, bytes: &[u8], durable: bool, mut choose: impl FnMut() -> bool) -> Result<(), i32> {
        let end = offset.saturating_add(bytes.len() as u64);
        if end > SIZE_MAX {
            return Err(libc::EFBIG);
        }
        self.with(file, |file| {
            if end > file.size {
                file.resize(end);
            }
            file.sequence += 1;
            let mut at = 0;
            while at < bytes.len() {
                let place = offset as usize + at;
                let step = (SECTOR - place % SECTOR).min(bytes.len() - at);
                if choose() {
                    file.current[place..place + step].copy_from_slice(&bytes[at..at + step]);
                    file.keep((place / SECTOR) as u64, durable);
                }
                at += step;
            }
        })
    }

    /// Zeroes a range within the file's size.
    pub fn zero(&self, file: &FileRef, offset: u64, length: u64, choose: impl FnMut() -> bool) -> Result<(), i32> {
        let size = self.size(file)?;
        let end = offset.saturating_add(length).min(size);
        if offset >= end {
            return Ok(());
        }
        self.write(file, offset, &vec![0; (end - offset) as usize], false, choose)
    }

    /// A point in the file's history, for [`flush`](Self::flush).
    pub fn sequence(&self, file: &FileRef) -> Result<u64, i32> {
        self.with(file, |file| file.sequence)
    }

    /// Makes durable what was written up to `sequence`.
    pub fn flush(&self, file: &FileRef, sequence: u64) -> Result<(), i32> {
        self.with(file, |file| {
            let SimFile { durable, versions, .. } = file;
            versions.retain(|sector, versions| {
                let covered = versions.iter().take_while(|(when, _)| *when <= sequence).count();
                if let Some((_, content)) = covered.checked_sub(1).and_then(|last| versions.get(last)) {
                    durable[*sector as usize * SECTOR..][..SECTOR].copy_from_slice(content);
                }
                versions.drain(..covered);
                !versions.is_empty()
            });
        })
    }

    /// The power goes: each sector is left with what was durable or anything written since. Vanished files stay so.
    pub fn cut_power(&self, rng: &mut Rng) {
        for file in self.0.borrow_mut().iter_mut() {
            for (sector, versions) in std::mem::take(&mut file.versions) {
                let chosen = rng.below(versions.len() as u64 + 1) as usize;
                if let Some((_, content)) = chosen.checked_sub(1).and_then(|chosen| versions.get(chosen)) {
                    file.durable[sector as usize * SECTOR..][..SECTOR].copy_from_slice(content);
                }
            }
            file.current.clone_from(&file.durable);
        }
    }
}

impl SimFile {
    fn resize(&mut self, size: u64) {
        let sectors = (size as usize).div_ceil(SECTOR);
        self.current.resize(sectors * SECTOR, 0);
        self.durable.resize(sectors * SECTOR, 0);
        if size < self.size {
            // The cut-off end of the last sector must read as zeros if the file grows again.
            self.current[size as usize..].fill(0);
            self.durable[size as usize..].fill(0);
            self.versions.retain(|sector, _| (*sector as usize) < sectors);
            if let Some(last) = (!(size as usize).is_multiple_of(SECTOR)).then(|| self.versions.get_mut(&(sectors as u64 - 1))).flatten() {
                last.iter_mut().for_each(|(_, content)| content[size as usize % SECTOR..].fill(0));
            }
        }
        self.size = size;
    }

    /// Notes a sector's new content.
    fn keep(&mut self, sector: u64, durable: bool) {
        let range = sector as usize * SECTOR..(sector as usize + 1) * SECTOR;
        if durable {
            self.durable[range.clone()].copy_from_slice(&self.current[range]);
            self.versions.remove(&sector);
        } else {
            let mut content = [0; SECTOR];
            content.copy_from_slice(&self.current[range]);
            self.versions.entry(sector).or_default().push((self.sequence, content));
        }
    }
}
