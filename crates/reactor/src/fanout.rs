//! One thing done on many reactors, and then one thing at home: the barrier behind every answer that promises quiet.
//!
//! Each part gets a [`Part`]; when the last part is finished (or dropped, because its reactor is gone) the
//! continuation is sent to the home reactor. It is sent exactly once.

use std::sync::{Arc, Mutex};

use crate::{Handle, Message, Reactor};

/// Collects parts.
pub struct Fanout {
    shared: Arc<Shared>,
}

struct Shared {
    home: Handle,
    then: Mutex<Option<Message>>,
}

/// One part's obligation. Finished when dropped.
pub struct Part {
    _shared: Arc<Shared>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(then) = self.then.lock().ok().and_then(|mut then| then.take()) {
            self.home.send(then);
        }
    }
}

impl Fanout {
    /// `then` runs on `home` when this value and all its parts are gone.
    pub fn new(home: Handle, then: impl FnOnce(&mut Reactor) + Send + 'static) -> Self {
        Self { shared: Arc::new(Shared { home, then: Mutex::new(Some(Message::new(then))) }) }
    }

    /// One more part to wait for.
    pub fn part(&self) -> Part {
        Part { _shared: self.shared.clone() }
    }

    /// Runs `each` on every reactor of `on`, with a part it keeps until it is done there.
    pub fn on_each<'a>(self, on: impl IntoIterator<Item = &'a Handle>, each: impl Fn(&mut Reactor, Part) + Clone + Send + 'static) {
        for handle in on {
            let (part, each) = (self.part(), each.clone());
            handle.send(Message::new(move |reactor| each(reactor, part)));
        }
    }
}
