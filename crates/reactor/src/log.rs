//! What reactors have to say: a bounded ring that Python reads, rate-limited where it is written.
//!
//! A line is formatted only if its limiter admits it, so that a hostile peer costs a comparison and not a
//! formatting; what was suppressed is counted and told with the next line of that component. A full ring drops.

use std::collections::{HashMap, VecDeque};
use std::fmt::Arguments;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Instant;

/// How grave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error,
    /// A peer misbehaved, or something is not as it should be.
    Warning,
    /// Worth knowing.
    Info,
    /// For developers.
    Debug,
}

/// One line.
#[derive(Clone, Debug)]
pub struct Line {
    /// How grave.
    pub level: Level,
    /// Which room speaks.
    pub component: &'static str,
    /// One sentence.
    pub message: String,
    /// Lines of this component dropped before this one.
    pub suppressed: u64,
}

/// Lines a second and component.
pub const RATE: u32 = 20;
/// Lines kept for a reader that is slow.
pub const KEPT: usize = 1024;

#[derive(Default)]
struct State {
    lines: VecDeque<Line>,
    limits: HashMap<&'static str, Limit>,
    notify: Option<Box<dyn Fn() + Send>>,
}

struct Limit {
    since: Instant,
    count: u32,
    suppressed: u64,
}

fn state() -> MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    STATE.get_or_init(Mutex::default).lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Says something. Control and error paths only: never once per I/O.
pub fn say(level: Level, component: &'static str, message: Arguments<'_>) {
    let mut state = state();
    let limit = state.limits.entry(component).or_insert(Limit { since: Instant::now(), count: 0, suppressed: 0 });
    if limit.since.elapsed().as_secs() >= 1 {
        (limit.since, limit.count) = (Instant::now(), 0);
    }
    limit.count += 1;
    if limit.count > RATE {
        limit.suppressed += 1;
        return;
    }
    let suppressed = std::mem::take(&mut limit.suppressed);
    if state.lines.len() == KEPT {
        state.lines.pop_front();
    }
    state.lines.push_back(Line { level, component, message: message.to_string(), suppressed });
    if let Some(notify) = &state.notify {
        notify();
    }
}

/// Takes the lines said since the last call.
pub fn take() -> Vec<Line> {
    state().lines.drain(..).collect()
}

/// Calls `notify` after each line; it must not say anything itself.
pub fn on_line(notify: impl Fn() + Send + 'static) {
    state().notify = Some(Box::new(notify));
}
