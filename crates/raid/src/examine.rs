//! Bdevs that appear: what their superblocks say they are members of, and who waits for them by name. Which superblock counts stands in `control.rs`.

use std::sync::Arc;

use qpair_bdev::BdevError;
use qpair_reactor::log::{self, Level as Severity};
use qpair_wire::raid_superblock::{BaseState, Level};
use uuid::Uuid;

use crate::array::{Array, Phase, Slot, lock};
use crate::control::{Raids, Spec, os};
use crate::superblock::{Found, Superblock, load};
use crate::worker::Worker;

impl Raids {
    pub(crate) fn is_member(&self, name: &str) -> bool {
        let has =
            |array: &Arc<Array>| lock(&array.state).slots.iter().any(|slot| slot.member.is_some() && slot.name.as_deref() == Some(name));
        lock(&self.arrays).iter().any(has)
    }

    pub(crate) async fn examine_now(self: &Arc<Self>, worker: &Worker, bdev: &str) -> Result<bool, BdevError> {
        self.sweep();
        let listing = self.registry.list(Some(bdev))?.pop().ok_or_else(|| BdevError::NoSuchBdev(bdev.to_owned()))?;
        if self.is_member(&listing.info.name) {
            return Ok(true);
        }
        if listing.claimed_by.is_some() {
            return Ok(false);
        }
        let found = {
            let reader = Arc::new(self.registry.open(&listing.info.name, false, |_| {})?);
            load(worker, &reader).await?
        };
        match found {
            Found::Superblock(found) => self.join(worker, *found, &listing.info.name, listing.info.uuid, listing.info.block_size).await,
            Found::Nothing => self.join_by_name(worker, &listing.info.name, listing.info.uuid).await,
        }
    }

    /// A bdev without a superblock is what arrays wait for that have none either.
    pub(crate) async fn join_by_name(self: &Arc<Self>, worker: &Worker, name: &str, uuid: Uuid) -> Result<bool, BdevError> {
        let waits = |array: &Arc<Array>| {
            let state = lock(&array.state);
            let this = |slot: &Slot| slot.member.is_none() && (slot.name.as_deref() == Some(name) || slot.uuid == Some(uuid));
            let slot = state.slots.iter().position(this)?;
            (state.phase == Phase::Configuring && state.sequence == 0 && !state.deleting).then(|| (array.clone(), slot))
        };
        let found = lock(&self.arrays).iter().find_map(waits);
        let Some((array, slot)) = found else { return Ok(false) };
        let _turn = array.turn.take(worker).await;
        if self.is_member(name) || lock(&array.state).slots[slot].member.is_some() {
            return Ok(self.is_member(name));
        }
        self.configure(worker, &array, slot).await.map(|()| true)
    }

    /// A bdev that says itself what it is a member of.
    pub(crate) async fn join(
        self: &Arc<Self>,
        worker: &Worker,
        found: Superblock,
        name: &str,
        uuid: Uuid,
        block_size: u32,
    ) -> Result<bool, BdevError> {
        if found.header.block_size.get() != block_size {
            let limit = format!("{}, by its superblock", found.header.block_size.get());
            return Err(BdevError::invalid("block_size", format!("{block_size} of bdev {name}"), limit));
        }
        let same = |array: &&Arc<Array>| array.uuid.into_bytes() == found.header.uuid;
        loop {
            let known = lock(&self.arrays).iter().find(same).cloned();
            let array = match known {
                Some(array) => self.newest(worker, array, &found, name).await?,
                None => self.array_of(&found)?,
            };
            let joined = self.admit(worker, &array, name, uuid).await;
            self.gather(worker, &array).await;
            // A newer superblock may have made it anew meanwhile.
            let replaced = lock(&self.arrays).iter().find(same).is_some_and(|now| !Arc::ptr_eq(now, &array));
            if !(replaced && matches!(joined, Err(BdevError::Removing(_)))) {
                return joined;
            }
        }
    }

    /// The array, made anew if what was found is newer than what it was made of.
    pub(crate) async fn newest(&self, worker: &Worker, array: Arc<Array>, found: &Superblock, name: &str) -> Result<Arc<Array>, BdevError> {
        // It may be about to come online.
        let _turn = array.turn.take(worker).await;
        let (sequence, phase, deleting) = {
            let state = lock(&array.state);
            (state.sequence, state.phase, state.deleting)
        };
        if deleting {
            return Err(BdevError::Removing(array.name.clone()));
        }
        if sequence == 0 {
            return Err(BdevError::invalid("superblock", format!("on bdev {name}"), format!("none: raid bdev {} has none", array.name)));
        }
        if found.header.seq_number.get() <= sequence {
            return Ok(array.clone());
        }
        if phase != Phase::Configuring {
            let what = format!("raid bdev {} is {}, and the superblock of bdev {name} is newer", array.name, phase.name());
            return Err(os(libc::EBUSY, what));
        }
        self.discard(&array);
        self.array_of(found)
    }

    /// The array that a superblock tells of.
    pub(crate) fn array_of(&self, found: &Superblock) -> Result<Arc<Array>, BdevError> {
        let header = &found.header;
        let slots = usize::from(header.num_base_bdevs);
        let spec = Spec {
            name: header.name().unwrap_or("").to_owned(),
            level: header.level(),
            strip_kb: (u64::from(header.strip_size.get()) * u64::from(header.block_size.get()) / 1024) as u32,
            bases: vec![String::new(); slots],
            uuid: Some(Uuid::from_bytes(header.uuid)),
            superblock: true,
        };
        let array = self.array(&spec)?;
        let mut state = lock(&array.state);
        (state.sequence, state.num_blocks, state.block_size) = (header.seq_number.get(), header.raid_size.get(), header.block_size.get());
        state.slots.iter_mut().for_each(|slot| *slot = Slot::default());
        state.operational = 0;
        for base in &found.bases {
            let slot = &mut state.slots[usize::from(base.slot)];
            slot.entry = Some(*base);
            slot.data_size = base.data_size.get();
            if base.state() == BaseState::CONFIGURED {
                (slot.uuid, slot.data_offset) = (Some(Uuid::from_bytes(base.uuid)), base.data_offset.get());
            }
        }
        state.operational = state.slots.iter().filter(|slot| slot.uuid.is_some()).count();
        if state.operational == 0 || (array.level != Level::RAID1 && state.operational != slots) {
            let value = state.operational;
            drop(state);
            self.discard(&array);
            return Err(BdevError::invalid("superblock", format!("with {value} current base bdevs"), "enough for its level"));
        }
        drop(state);
        Ok(array)
    }

    /// Gives a bdev the slot that the array's superblock has for it.
    pub(crate) async fn admit(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>, name: &str, uuid: Uuid) -> Result<bool, BdevError> {
        let _turn = array.turn.take(worker).await;
        let (slot, phase) = {
            let mut state = lock(&array.state);
            let (phase, busy) = (state.phase, state.process.is_some());
            let recorded = |slot: &Slot| slot.recorded().filter(|(recorded, _)| *recorded == uuid).map(|(_, state)| state);
            let Some(number) = state.slots.iter().position(|slot| recorded(slot).is_some()) else {
                return Err(BdevError::invalid(
                    "uuid",
                    format!("{uuid} of bdev {name}"),
                    format!("one of raid bdev {}'s superblock", array.name),
                ));
            };
            let current = recorded(&state.slots[number]) == Some(BaseState::CONFIGURED);
            let slot = &mut state.slots[number];
            if slot.member.is_some() {
                return if slot.name.as_deref() == Some(name) { Ok(true) } else { Err(BdevError::Exists(name.to_owned())) };
            }
            match phase {
                Phase::Configuring if current => {}
                Phase::Online if slot.is_empty() && !busy => (slot.name, slot.uuid) = (Some(name.to_owned()), Some(uuid)),
                // Its turn comes when the array is online, or when the rebuild under way is over.
                _ => return Ok(false),
            }
            (number, phase)
        };
        let outcome = self.configure(worker, array, slot).await;
        if outcome.is_err() && phase == Phase::Online {
            let mut state = lock(&array.state);
            if !state.slots[slot].configured {
                state.slots[slot].clear();
            }
        }
        outcome.map(|()| true)
    }

    /// Looks for the other members of an array among the bdevs there are: first the current ones; once it is online, those that are to be rebuilt.
    pub(crate) async fn gather(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>) {
        for slot in 0..array.slots {
            let wanted = {
                let state = lock(&array.state);
                let slot = &state.slots[slot];
                let current = slot.recorded().filter(|(_, state)| *state == BaseState::CONFIGURED);
                current.filter(|_| slot.member.is_none() && state.phase == Phase::Configuring && !state.deleting)
            };
            if let Some((uuid, _)) = wanted {
                self.admit_found(worker, array, uuid).await;
            }
        }
        if lock(&array.state).phase == Phase::Online {
            let (raids, array, tasks) = (self.clone(), array.clone(), worker.clone());
            worker.spawn(async move { raids.take_back(&tasks, &array).await });
        }
    }

    /// Rebuilds, one after the other, onto the members that were out when the array came online and are there.
    pub(crate) async fn take_back(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>) {
        let out: Vec<Uuid> = {
            let state = lock(&array.state);
            let empty = state.slots.iter().filter(|slot| slot.is_empty());
            empty.filter_map(|slot| slot.recorded().map(|(uuid, _)| uuid)).collect()
        };
        for uuid in out {
            worker.until(|| lock(&array.state).process.is_none().then_some(())).await;
            if lock(&array.state).deleting || lock(&array.state).phase != Phase::Online {
                return;
            }
            self.admit_found(worker, array, uuid).await;
        }
    }

    /// A bdev of that UUID, if it is there, free, and its own superblock is this array's.
    pub(crate) async fn admit_found(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>, uuid: Uuid) {
        let Some(listing) = self.registry.list(Some(&uuid.to_string())).ok().and_then(|mut found| found.pop()) else { return };
        if listing.claimed_by.is_some() || listing.removing {
            return;
        }
        let Ok(reader) = self.registry.open(&listing.info.name, false, |_| {}).map(Arc::new) else { return };
        let found = load(worker, &reader).await;
        drop(reader);
        let Ok(Found::Superblock(found)) = found else { return };
        let sequence = lock(&array.state).sequence;
        if found.header.uuid != array.uuid.into_bytes() || found.header.seq_number.get() > sequence {
            return;
        }
        if let Err(error) = self.admit(worker, array, &listing.info.name, uuid).await {
            log::say(Severity::Warning, "raid", format_args!("{}: bdev {}: {error}", array.name, listing.info.name));
        }
    }
}
