//! What a Python object holds of a ring: the ring is closed when Python lets the object go, for nobody is left who could answer for it.
//!
//! In a forked child nothing of it is touched, and nothing dropped: threads that the parts rely on are not there.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use pyo3::prelude::*;
use qpair_bdev::python::Ring;

use crate::engine::not_forked;

/// A ring, and what serves it. See the module's doc.
pub struct Held<T> {
    pid: u32,
    parts: ManuallyDrop<(Arc<Ring>, T)>,
}

impl<T> Held<T> {
    pub fn new(ring: Arc<Ring>, server: T) -> Self {
        Self { pid: std::process::id(), parts: ManuallyDrop::new((ring, server)) }
    }

    /// For figures, which can do no harm.
    pub fn parts(&self) -> &(Arc<Ring>, T) {
        &self.parts
    }

    /// What serves the ring, unless this is a forked child.
    pub fn server(&self) -> PyResult<&T> {
        not_forked(self.pid)?;
        Ok(&self.parts.1)
    }

    /// Ends the ring.
    pub fn close(&self) -> PyResult<()> {
        not_forked(self.pid)?;
        self.parts.0.close();
        Ok(())
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        if self.close().is_ok() {
            // SAFETY: taken once, here; `self` is not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.parts) };
        }
    }
}
