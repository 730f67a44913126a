//! The ledger of what must happen exactly once.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Opened once, closed once: an Io from submission to completion, a request from a guest's ring to its used entry. Clones
/// are the same ledger, and may travel with messages.
#[derive(Clone, Debug, Default)]
pub struct Obligations(Arc<Mutex<Ledger>>);

#[derive(Debug, Default)]
struct Ledger {
    open: BTreeSet<u64>,
    closed: HashSet<u64>,
    next: u64,
    violation: Option<String>,
}

impl Obligations {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens `id`; panics if it was opened before. Do not mix with [`open_next`](Self::open_next).
    pub fn open(&self, id: u64) {
        let mut ledger = self.ledger();
        let fresh = !ledger.closed.contains(&id) && ledger.open.insert(id);
        ledger.demand(fresh, || format!("obligation {id} was opened twice"));
    }

    /// Opens one under a number of the ledger's own.
    pub fn open_next(&self) -> u64 {
        let mut ledger = self.ledger();
        ledger.next += 1;
        let id = ledger.next;
        ledger.open.insert(id);
        id
    }

    /// Closes `id`; panics if it is not open, and makes the world fail should the panic be caught.
    pub fn close(&self, id: u64) {
        let mut ledger = self.ledger();
        let was_open = ledger.open.remove(&id);
        let again = !ledger.closed.insert(id);
        ledger.demand(was_open, || format!("obligation {id} was closed {}", if again { "twice" } else { "without being open" }));
    }

    /// Whether `id` is open.
    pub fn is_open(&self, id: u64) -> bool {
        self.ledger().open.contains(&id)
    }

    /// How many are open.
    pub fn open_count(&self) -> usize {
        self.ledger().open.len()
    }

    /// How many were closed.
    pub fn closed_count(&self) -> usize {
        self.ledger().closed.len()
    }

    /// Whether none is open.
    pub fn all_closed(&self) -> bool {
        self.open_count() == 0
    }

    /// The open ones, at most `limit` of them.
    pub fn some_open(&self, limit: usize) -> Vec<u64> {
        self.ledger().open.iter().take(limit).copied().collect()
    }

    /// Forgets the open ones: after a crash nobody answers them.
    pub fn abandon_open(&self) -> Vec<u64> {
        let mut ledger = self.ledger();
        let open: Vec<u64> = std::mem::take(&mut ledger.open).into_iter().collect();
        ledger.closed.extend(&open);
        open
    }

    /// What was violated first, if anything.
    pub fn violation(&self) -> Option<String> {
        self.ledger().violation.clone()
    }
}

impl Ledger {
    fn demand(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            let text = otherwise();
            self.violation.get_or_insert(text.clone());
            panic!("{text}");
        }
    }
}
