//! epoll driver.
use super::*;
/// epoll.
pub struct Epoll { bell: Event }
impl Epoll { /// Opens.
 pub fn new() -> io::Result<Self> { Ok(Self{bell: Event::new()?}) } }
impl Driver for Epoll {
    fn name(&self) -> &'static str { "epoll" }
    fn submit(&mut self, request: Request) -> Result<(), Request> { Err(request) }
    fn unplug(&mut self) {}
    fn watch(&mut self, _event: &Event, _poller: PollerId) -> io::Result<WatchId> { Ok(WatchId(0)) }
    fn unwatch(&mut self, _watch: WatchId) {}
    fn reap(&mut self, _out: &mut Vec<Completion>) {}
    fn wait(&mut self, t: Option<u64>) { std::thread::sleep(std::time::Duration::from_nanos(t.unwrap_or(1_000_000).min(1_000_000))); self.bell.take(); }
    fn bell(&self) -> Event { self.bell.twin().expect("dup") }
    fn outstanding(&self) -> usize { 0 }
    fn cancel_all(&mut self) {}
}
