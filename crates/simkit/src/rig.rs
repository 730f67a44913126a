//! What tests do alike: clients on every reactor, removal, and the look at what is left in the end.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once, Weak};

use qpair_bdev::lifecycle::{self, Reply};
use qpair_bdev::{BdevError, Layer, Registry};
use qpair_memory::Mapping;
use qpair_reactor::sim::{Obligations, World};

use crate::client::{Client, Load};
use crate::model::{Fills, Model, SharedModel};

/// Clients on all reactors of a world, each with blocks of its own.
pub struct Crew {
    /// What they know, by client.
    pub models: Vec<(usize, SharedModel)>,
    memories: Vec<Weak<Mapping>>,
}

impl Crew {
    /// So many clients on each reactor with so many blocks each, which hold `content`.
    pub fn new(world: &mut World, clients: RangeInclusive<u64>, blocks: u64, content: Fills) -> Self {
        let most = *clients.end();
        let mut models = Vec::new();
        for reactor in 0..world.reactors() {
            for client in 0..world.rng().between(*clients.start(), most) {
                models.push((reactor, Model::new((reactor as u64 * most + client) * blocks, blocks, content)));
            }
        }
        Self { models, memories: Vec::new() }
    }

    /// Blocks of a bdev that has room for them all.
    pub fn blocks(world: &World, clients: u64, blocks: u64) -> u64 {
        world.reactors() as u64 * clients * blocks
    }

    /// Sets them to work, on a registry that may be another one than before.
    pub fn start(&mut self, world: &mut World, registry: &Arc<Registry>, load: &Load, ios: RangeInclusive<u64>) {
        for (reactor, model) in &self.models {
            let ios = world.rng().between(*ios.start(), *ios.end()) as u32;
            self.memories.push(Client::start(world, *reactor, registry, &Load { ios, ..load.clone() }, model));
        }
    }

    /// The power went, and all of them with it.
    pub fn crash(&mut self) {
        self.models.iter().for_each(|(_, model)| crate::model::lock(model).crash());
        self.memories.clear();
    }

    /// Clients that know the same, and go on with what has been copied, or has gone another way.
    pub fn fork(&self) -> Self {
        let copy = |model: &SharedModel| Arc::new(std::sync::Mutex::new(crate::model::lock(model).clone()));
        Self { models: self.models.iter().map(|(reactor, model)| (*reactor, copy(model))).collect(), memories: Vec::new() }
    }

    /// Reads compared so far.
    pub fn reads(&self) -> u64 {
        self.models.iter().map(|(_, model)| crate::model::lock(model).reads).sum()
    }

    /// Bytes that were spoilt so far.
    pub fn spoilt(&self) -> u64 {
        self.models.iter().map(|(_, model)| crate::model::lock(model).spoilt).sum()
    }

    /// The end of a test: nobody holds their memory any more.
    pub fn check_end(&self) {
        assert!(self.memories.iter().all(|memory| memory.upgrade().is_none()), "memory is still held");
    }
}

/// The end of a test: every I/O is back in its reactor's slab.
pub fn check_slabs(world: &mut World) {
    for reactor in 0..world.reactors() {
        let (all, free) = world.with(reactor, |reactor| Layer::of(reactor).borrow().ios());
        assert_eq!(all, free, "I/Os leaked on reactor {reactor}");
    }
}

/// A reply that must come exactly once, with an outcome that `legal` admits.
pub fn promise<T: std::fmt::Debug>(ledger: &Obligations, legal: impl FnOnce(&Result<T, BdevError>) -> bool + Send + 'static) -> Reply<T> {
    let (id, ledger) = (ledger.open_next(), ledger.clone());
    Box::new(move |outcome| {
        // While a failed seed is taken apart its answer is only in the way of the seed's name.
        if std::thread::panicking() {
            return;
        }
        assert!(legal(&outcome), "{outcome:?}");
        ledger.close(id);
    })
}

/// Whether a control operation came too late.
pub fn is_going(error: &BdevError) -> bool {
    matches!(error, BdevError::NoSuchBdev(_) | BdevError::Removing(_))
}

/// Removes a bdev at once, which must succeed, and lets the world come to rest.
pub fn remove(world: &mut World, registry: &Arc<Registry>, name: &str) {
    lifecycle::unregister(registry, name, 0, promise(world.obligations(), Result::is_ok));
    world.finish();
}

static PLANNED: AtomicU64 = AtomicU64::new(0);

/// How many planned panics there were in this process.
pub fn planned_panics() -> u64 {
    PLANNED.load(Ordering::SeqCst)
}

/// Planned panics say nothing; others do.
pub fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| match panic.payload().downcast_ref::<&str>() {
            Some(&"planned") => drop(PLANNED.fetch_add(1, Ordering::SeqCst)),
            _ => usual(panic),
        }));
    });
}
