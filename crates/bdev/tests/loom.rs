//! Model check of the ring to Python: every interleaving, and every stale value that the memory model allows, within three preemptions.
//!
//! `turn.rs` is compiled here once more, over loom's atomics. loom does not model the single order of SeqCst loads and stores, only that of fences, so what
//! passes here rests on fences alone.

#[path = "../src/python/turn.rs"]
mod turn;
mod sync {
    pub(crate) use loom::sync::atomic;
}

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use turn::Turn;

/// Dropped, unless the model has failed already: then loom's types must not be touched any more.
struct Calm<T>(Option<T>);

impl<T> Drop for Calm<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::mem::forget(self.0.take());
        }
    }
}

impl<T> std::ops::Deref for Calm<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().unwrap()
    }
}

fn calm<T>(value: T) -> Arc<Calm<T>> {
    Arc::new(Calm(Some(value)))
}

/// An event: level until taken.
struct Bell {
    rung: Mutex<usize>,
    wake: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() += 1;
        self.wake.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while *rung == 0 {
            rung = self.wake.wait(rung).unwrap();
        }
        *rung = 0;
    }
}

struct Shared {
    /// Requests that lie in the queue: relaxed, so that nothing but the protocol's fences orders the looks at it.
    queue: AtomicUsize,
    turn: Turn,
    bell: Bell,
}

impl Shared {
    fn new() -> Arc<Calm<Self>> {
        let bell = Bell { rung: Mutex::new(0), wake: Condvar::new() };
        calm(Self { queue: AtomicUsize::new(0), turn: Turn::default(), bell })
    }

    fn push(&self) {
        self.queue.fetch_add(1, Ordering::Relaxed);
        if self.turn.must_call() {
            self.bell.ring();
        }
    }

    /// As `Ring::fetch`: what there is, or nothing once it may rest.
    fn fetch(&self, may_rest: fn(&Shared) -> bool) -> usize {
        loop {
            let found = self.queue.load(Ordering::Relaxed);
            if found > 0 {
                self.queue.fetch_sub(found, Ordering::Relaxed);
                return found;
            }
            if may_rest(self) {
                return 0;
            }
        }
    }
}

/// The consumer's loop; a lost call is a deadlock, which loom reports.
fn no_call_is_lost(may_rest: fn(&Shared) -> bool) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let shared = Shared::new();
        let producers: Vec<_> = (0..2)
            .map(|_| {
                let shared = shared.clone();
                thread::spawn(move || shared.push())
            })
            .collect();
        let mut done = 0;
        while done < 2 {
            match shared.fetch(may_rest) {
                0 => shared.bell.wait(),
                found => done += found,
            }
        }
        producers.into_iter().for_each(|producer| producer.join().unwrap());
    });
}

#[test]
fn the_consumer_that_rests_is_called() {
    no_call_is_lost(|shared| shared.turn.may_rest(|| shared.queue.load(Ordering::Relaxed) == 0));
}

/// The model is worth something: without the second look it deadlocks.
#[test]
#[should_panic(expected = "deadlock")]
fn without_the_second_look_a_call_is_lost() {
    no_call_is_lost(|shared| shared.turn.may_rest(|| true));
}

/// The consumer's store and look, and the producer's push and look, each need their fence.
#[test]
#[should_panic(expected = "deadlock")]
fn without_a_fence_a_call_is_lost() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let bell = Bell { rung: Mutex::new(0), wake: Condvar::new() };
        let shared = calm((AtomicBool::new(true), AtomicUsize::new(0), bell));
        let producer = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (called, queue, bell) = &**shared;
                queue.store(1, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if !called.load(Ordering::Relaxed) {
                    bell.ring();
                }
            })
        };
        let (called, queue, bell) = &**shared;
        called.store(false, Ordering::Relaxed);
        // No fence here.
        while queue.load(Ordering::Relaxed) == 0 {
            bell.wait();
        }
        producer.join().unwrap();
    });
}
