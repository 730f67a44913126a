//! Messages between reactors: an intrusive, unbounded, multi-producer inbox.
//!
//! How it works. A message is one allocation made by whoever writes it; the link is part of it, so that *sending*
//! neither allocates nor fails. Senders push onto a stack by compare-and-swap; the owner takes the whole stack by
//! one swap and turns it round, so messages of one sender arrive in the order sent. There is no half-linked state:
//! the inbox is empty exactly when its head is null, which is what [`crate::doorbell`] relies on.
//!
//! A message that is never run (its reactor is gone) is dropped with the inbox; what it captured tells its waiter so.

use std::ptr;

#[cfg(loom)]
use loom::sync::atomic::{AtomicPtr, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::Reactor;

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
    /// Puts a message in. Never fails, never allocates, never blocks.
    pub fn push(&self, message: Message) {
        let node = Box::into_raw(message.0);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
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
        self.head.load(Ordering::SeqCst).is_null()
    }

    /// Takes all that is there, oldest first.
    pub fn take(&self) -> Taken {
        let mut node = self.head.swap(ptr::null_mut(), Ordering::Acquire);
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
        drop(self.take());
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
