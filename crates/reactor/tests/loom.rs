//! Model checks of what reactors and their peers do without locks: every interleaving, and every stale value that the
//! memory model allows, within two or three preemptions.
//!
//! The modules under test are compiled here once more, over loom's atomics. loom does not model the single order of
//! SeqCst loads and stores, only that of fences, so what passes here rests on fences alone.

#[allow(dead_code)]
#[path = "../src/doorbell.rs"]
mod doorbell;
#[allow(dead_code)]
#[path = "../src/message.rs"]
mod message;
mod sync {
    pub(crate) use loom::sync::atomic;
}

use std::mem::ManuallyDrop;

use doorbell::Doorbell;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use message::{Inbox, Message};

/// What messages run on.
#[derive(Default)]
pub struct Reactor {
    ran: Vec<(u8, u8)>,
}

fn model(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(check);
}

/// An eventfd: level until taken.
struct Bell {
    rung: Mutex<bool>,
    wake: Condvar,
}

impl Bell {
    fn new() -> Self {
        Self { rung: Mutex::new(false), wake: Condvar::new() }
    }

    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.wake.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.wake.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// A message with content that only the inbox's own ordering makes safe to read.
fn message(sender: u8, number: u8) -> Message {
    let content = UnsafeCell::new((0, 0));
    // SAFETY: not shared yet.
    content.with_mut(|content| unsafe { *content = (sender, number) });
    // SAFETY: the closure is the only owner; loom fails the test if the inbox does not order this read after the write.
    Message::new(move |reactor| reactor.ran.push(content.with(|content| unsafe { *content })))
}

fn of(sender: u8, ran: &[(u8, u8)]) -> Vec<u8> {
    ran.iter().filter(|(whose, _)| *whose == sender).map(|(_, number)| *number).collect()
}

#[test]
fn messages_of_two_senders_all_arrive_in_each_senders_order() {
    model(3, || {
        let inbox = Arc::new(Inbox::default());
        let senders: Vec<_> = (0..2u8)
            .map(|sender| {
                let inbox = inbox.clone();
                thread::spawn(move || (0..2).for_each(|number| inbox.push(message(sender, number))))
            })
            .collect();
        let mut reactor = Reactor::default();
        inbox.take().for_each(|message| message.run(&mut reactor));
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        inbox.take().for_each(|message| message.run(&mut reactor));
        assert!(inbox.is_empty());
        assert_eq!((of(0, &reactor.ran), of(1, &reactor.ran)), (vec![0, 1], vec![0, 1]));
    });
}

#[test]
fn a_message_to_an_inbox_that_closes_is_run_or_dropped_never_kept() {
    model(3, || {
        let inbox = Arc::new(Inbox::default());
        // loom fails the test if this count is leaked.
        let captured = Arc::new(());
        let (sender, content) = (inbox.clone(), captured.clone());
        let sending = thread::spawn(move || sender.push(Message::new(move |_| drop(content))));
        inbox.close();
        sending.join().unwrap();
        assert!(inbox.is_empty());
        assert_eq!(Arc::strong_count(&captured), 1);
    });
}

/// Dropped, unless the model has failed already: then loom's types must not be touched any more.
struct Calm<T>(ManuallyDrop<T>);

impl<T> Drop for Calm<T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: this is the only drop.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// The owner's loop; a lost wake-up is a deadlock, which loom reports.
fn no_wake_up_is_lost(may_sleep: fn(&Doorbell, &Inbox) -> bool) {
    model(3, move || {
        let shared = std::sync::Arc::new(Calm(ManuallyDrop::new((Inbox::default(), Doorbell::default(), Bell::new()))));
        let senders: Vec<_> = (0..2u8)
            .map(|sender| {
                let shared = shared.clone();
                thread::spawn(move || {
                    let (inbox, doorbell, bell) = &*shared.0;
                    inbox.push(message(sender, 0));
                    if doorbell.must_ring() {
                        bell.ring();
                    }
                })
            })
            .collect();
        let (inbox, doorbell, bell) = &*shared.0;
        let mut reactor = Reactor::default();
        while reactor.ran.len() < 2 {
            inbox.take().for_each(|message| message.run(&mut reactor));
            if reactor.ran.len() < 2 && may_sleep(doorbell, inbox) {
                bell.wait();
                doorbell.awake();
            }
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}

#[test]
fn a_sleeping_owner_is_always_rung() {
    no_wake_up_is_lost(|doorbell, inbox| doorbell.may_sleep(|| inbox.is_empty()));
}

#[test]
#[should_panic(expected = "deadlock")]
fn an_owner_that_does_not_look_again_would_sleep_for_ever() {
    no_wake_up_is_lost(|doorbell, _| doorbell.may_sleep(|| true));
}

/// A split ring with event index: the peer publishes requests and kicks when asked; the device arms and looks again.
struct Ring {
    available: AtomicU16,
    /// "Kick me when you publish the request of this number."
    kick_at: AtomicU16,
    kick: Bell,
}

/// Virtio 1.2, 2.7.10: whether the peer, having gone from `old` to `new`, passed `event`.
fn must_kick(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn no_request_is_overlooked(peers_fence: bool, devices_fence: bool) {
    const REQUESTS: u16 = 2;
    model(3, move || {
        let ring = Arc::new(Ring { available: AtomicU16::new(0), kick_at: AtomicU16::new(u16::MAX), kick: Bell::new() });
        let peer = ring.clone();
        let peer = thread::spawn(move || {
            for old in 0..REQUESTS {
                peer.available.store(old + 1, Ordering::Release);
                if peers_fence {
                    fence(Ordering::SeqCst);
                }
                if must_kick(peer.kick_at.load(Ordering::Relaxed), old + 1, old) {
                    peer.kick.ring();
                }
            }
        });
        let mut seen = 0;
        while seen < REQUESTS {
            // Poll.
            seen = ring.available.load(Ordering::Acquire);
            // Arm: publish "kick me", fence, look again.
            ring.kick_at.store(seen, Ordering::Relaxed);
            if devices_fence {
                fence(Ordering::SeqCst);
            }
            if seen < REQUESTS && ring.available.load(Ordering::Acquire) == seen {
                ring.kick.wait();
            }
        }
        peer.join().unwrap();
    });
}

#[test]
fn arming_by_event_index_overlooks_no_request() {
    no_request_is_overlooked(true, true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn arming_without_the_devices_fence_would_overlook_a_request() {
    no_request_is_overlooked(true, false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn arming_against_a_peer_without_a_fence_would_overlook_a_request() {
    no_request_is_overlooked(false, true);
}

#[test]
fn arming_by_flag_overlooks_no_request() {
    model(3, || {
        // The ring without event index, and a packed ring or a socket's "want events" just the same.
        let ring = Arc::new((AtomicU16::new(0), AtomicBool::new(false), Bell::new()));
        let peer = ring.clone();
        let peer = thread::spawn(move || {
            for published in 1..=2 {
                peer.0.store(published, Ordering::Release);
                fence(Ordering::SeqCst);
                if peer.1.load(Ordering::Relaxed) {
                    peer.2.ring();
                }
            }
        });
        let mut seen = 0;
        while seen < 2 {
            seen = ring.0.load(Ordering::Acquire);
            ring.1.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if seen < 2 && ring.0.load(Ordering::Acquire) == seen {
                ring.2.wait();
            }
            ring.1.store(false, Ordering::Relaxed);
        }
        peer.join().unwrap();
    });
}
