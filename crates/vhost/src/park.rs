//! Continuations that wait on their own reactor for others to be done.

use std::cell::RefCell;
use std::collections::HashMap;

use qpair_reactor::Reactor;

type Continuation = Box<dyn FnOnce(&mut Reactor)>;

/// Continuations hold things of the home reactor, so they stay there; what crosses threads is only their number.
#[derive(Default)]
struct Parked {
    next: u64,
    waiting: HashMap<u64, Continuation>,
}

/// What calls `then` when it comes back to this reactor, with what stays here.
pub(crate) fn park<T: Clone + 'static>(
    reactor: &mut Reactor,
    kept: &T,
    then: impl FnOnce(&mut Reactor, &T) + 'static,
) -> impl FnOnce(&mut Reactor) + Send + 'static {
    let parked = reactor.local::<RefCell<Parked>>();
    let mut parked = parked.borrow_mut();
    parked.next += 1;
    let (number, kept) = (parked.next, kept.clone());
    parked.waiting.insert(number, Box::new(move |reactor| then(reactor, &kept)));
    move |reactor: &mut Reactor| {
        let then = reactor.local::<RefCell<Parked>>().borrow_mut().waiting.remove(&number);
        if let Some(then) = then {
            then(reactor);
        }
    }
}
