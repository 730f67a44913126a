//! What every reactor knows of an array: an immutable snapshot, replaced as a whole and acknowledged by all.
//!
//! How it works. [`Array::publish`] changes the snapshot, sends it to every reactor and waits until all have it in force. A channel that is opened
//! meanwhile begins with the newest; one that gets an older than it has ignores it. So after `publish` nothing anywhere goes by what was before.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::{Descriptor, Layer};
use qpair_reactor::{Fanout, Reactor};

use crate::array::{Array, lock};
use crate::mask::Mask;
use crate::mirror::Mirror;
use crate::worker::Worker;

/// See the module's doc. Slots beyond the array's count are in no set.
#[derive(Clone, Default)]
pub(crate) struct View {
    /// Counts changes.
    pub version: u64,
    /// What is in each slot.
    pub members: Vec<Option<Arc<Descriptor>>>,
    /// Where data begin in each slot, in blocks.
    pub offsets: Vec<u64>,
    /// Read from. All of them hold whatever was acknowledged.
    pub serving: Mask,
    /// Written to: those, and the target of a rebuild.
    pub writing: Mask,
    /// Known to be out by every superblock of those that serve, on stable media. A write that misses other slots is not acknowledged.
    pub recorded: Mask,
    /// Slots that could not be recorded, in the attempt of that number: what waits for that fails.
    pub refused: (u64, Mask),
}

/// An array's channels on one reactor.
#[derive(Default)]
struct Local(RefCell<Vec<(u64, Weak<RefCell<Mirror>>)>>);

/// Has the channel told of changes, as long as it lives.
pub(crate) fn enlist(reactor: &mut Reactor, array: u64, channel: &Rc<RefCell<Mirror>>) {
    let local = reactor.local::<Local>();
    let mut channels = local.0.borrow_mut();
    channels.retain(|(_, channel)| channel.strong_count() > 0);
    channels.push((array, Rc::downgrade(channel)));
}

impl Array {
    /// The snapshot in force.
    pub(crate) fn view(&self) -> Arc<View> {
        lock(&self.state).view.clone()
    }

    /// Changes the snapshot and waits until it is in force everywhere; which of the slots written to missed a write that was acknowledged, or
    /// could not be opened, on any reactor.
    pub(crate) async fn publish(self: &Arc<Self>, worker: &Worker, change: impl FnOnce(&mut View)) -> Mask {
        let view = {
            let mut state = lock(&self.state);
            let mut view = View::clone(&state.view);
            change(&mut view);
            view.version += 1;
            state.view = Arc::new(view);
            state.view.clone()
        };
        let (missed, done) = (Arc::new(Mutex::new(Mask::EMPTY)), Arc::new(AtomicBool::new(false)));
        let (id, all, told) = (self.id, missed.clone(), done.clone());
        let then = move |reactor: &mut Reactor| {
            told.store(true, Ordering::Release);
            Worker::wake(reactor);
        };
        Fanout::new(self.home().clone(), then).on_each(self.registry.reactors(), move |reactor, part| {
            let mine = apply(reactor, id, &view);
            let mut all = lock(&all);
            *all = *all | mine;
            drop(part);
        });
        worker.until(|| done.load(Ordering::Acquire).then_some(())).await;
        *lock(&missed)
    }
}

fn apply(reactor: &mut Reactor, array: u64, view: &Arc<View>) -> Mask {
    let local = reactor.local::<Local>();
    let of_it = |(id, channel): &(u64, Weak<RefCell<Mirror>>)| if *id == array { channel.upgrade() } else { None };
    let channels: Vec<_> = local.0.borrow().iter().filter_map(of_it).collect();
    let layer = Layer::of(reactor);
    let mut layer = layer.borrow_mut();
    let mut missed = Mask::EMPTY;
    for channel in channels {
        missed = missed | channel.borrow_mut().apply(&mut layer, reactor, view);
    }
    layer.settle(reactor);
    missed
}
