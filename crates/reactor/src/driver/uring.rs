//! io_uring driver.
use super::*;
/// One io_uring.
pub struct Uring;
impl Uring { /// Opens.
 pub fn new() -> io::Result<super::epoll::Epoll> { Err(io::Error::other("not yet")) } }
