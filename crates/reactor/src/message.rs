//! Messages between reactors: an intrusive, unbounded, multi-producer inbox.
//!
//! How it works. A message is one allocation made by whoever writes it; the link is part of it, so that *sending*
//! neither allocates nor fails. Senders push onto a stack by compare-and-swap; the owner takes the whole stack by
//! one swap and turns it round, so messages of one sender arrive in the order sent. There is no half-linked state:
//! the inbox is empty exactly when its head is null, which is what [`crate::doorbell`] relies on.
//!
//! A message that is never run is dropped, and what it captured tells its waiter so: a reactor that goes closes its
//! inbox, which drops what is in it and whatever is pushed later. (The inbox itself lives as long as its handles, one of
//! which may lie in such a message.)
//!
//! The model check is in this crate's `tests/loom.rs`.

use std::ptr;

use crate::Reactor;
use crate::sync::atomic::{AtomicPtr, Ordering};

type Run = Box<dyn FnOnce(&mut Reactor) + Send>;

struct Node {
    next: *mut Node,
    run: Run,
}

// SAFETY: the link is written only by whoever owns the node (sender, then taker), and the closure is Send.
unsafe impl Send for Node {}

/// Something to be run on another reactor.
pub struct Message(Box<Node>);

impl Message {
    /// Wraps a closure. The only allocation of a message's life.
    pub fn new(run: impl FnOnce(&mut Reactor) + Send + 'static) -> Self {
        Self(Box::new(Node { next: ptr::null_mut(), run: Box::new(run) }))
    }

    /// Runs it here.
    pub fn run(self, reactor: &mut Reactor) {
        (self.0.run)(reactor);
    }
}

/// The head of a closed inbox; no node is there.
fn closed() -> *mut Node {
    ptr::without_provenance_mut(1)
}

/// Many senders, one owner.
pub struct Inbox {
    head: AtomicPtr<Node>,
}

// SAFETY: nodes are owned by exactly one party at a time (sender, inbox, taker) and their content is Send.
unsafe impl Send for Inbox {}
// SAFETY: all shared access goes through the atomic head.
unsafe impl Sync for Inbox {}

impl Default for Inbox {
    fn default() -> Self {
        Self { head: AtomicPtr::new(ptr::null_mut()) }
    }
}

impl Inbox {
    /// Puts a message in. Never fails, never allocates, never blocks. A closed inbox drops it.
    pub fn push(&self, message: Message) {
        let node = Box::into_raw(message.0);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            if head == closed() {
                // SAFETY: the node came from Box::into_raw above and was not published.
                drop(unsafe { Box::from_raw(node) });
                return;
            }
            // SAFETY: the node is ours until the exchange below succeeds.
            unsafe { (*node).next = head };
            // Release: who takes the node sees its content. SeqCst: ordered with the doorbell's flag.
            match self.head.compare_exchange_weak(head, node, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        let head = self.head.load(Ordering::SeqCst);
        head.is_null() || head == closed()
    }

    /// Takes all that is there, oldest first.
    pub fn take(&self) -> Taken {
        self.swap(ptr::null_mut())
    }

    /// Drops what is there and all that comes: its owner goes.
    pub fn close(&self) {
        drop(self.swap(closed()));
    }

    /// Puts `head` in place of all messages.
    fn swap(&self, head: *mut Node) -> Taken {
        let mut node = self.head.swap(head, Ordering::AcqRel);
        if node == closed() {
            self.head.store(closed(), Ordering::Release);
            return Taken(ptr::null_mut());
        }
        let mut reversed: *mut Node = ptr::null_mut();
        while !node.is_null() {
            // SAFETY: the swap made the whole chain ours; each node came from Box::into_raw in `push`.
            unsafe {
                let next = (*node).next;
                (*node).next = reversed;
                reversed = node;
                node = next;
            }
        }
        Taken(reversed)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.close();
    }
}

/// Messages taken out of an inbox; those not iterated over are dropped with it.
pub struct Taken(*mut Node);

impl Iterator for Taken {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        if self.0.is_null() {
            return None;
        }
        // SAFETY: the chain is ours (see `take`) and this node leaves it here.
        let node = unsafe { Box::from_raw(self.0) };
        self.0 = node.next;
        Some(Message(node))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}
