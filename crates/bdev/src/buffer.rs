//! Memory that a front end of our own does I/O with, placed where its device likes it best.

use std::any::Any;
use std::sync::Arc;

use qpair_memory::{Mapping, Pages};

use crate::BdevError;

/// A range of a mapping, its holder's alone until dropped.
pub struct Buffer {
    mapping: Arc<Mapping>,
    offset: u64,
    length: u64,
    /// Gives the range back to whoever lent it.
    _lease: Option<Box<dyn Any + Send + Sync>>,
}

impl Buffer {
    /// Plain memory, good for every device.
    pub fn plain(bytes: u64) -> Result<Self, BdevError> {
        let limit = isize::MAX as u64 / 2;
        if bytes == 0 || bytes > limit {
            return Err(BdevError::invalid("buffer_bytes", bytes, format!("1 to {limit}")));
        }
        Ok(Self { mapping: Mapping::anonymous(bytes as usize, Pages::Transparent)?, offset: 0, length: bytes, _lease: None })
    }

    /// `length` bytes at `offset` of a device's own mapping; dropping `lease` gives them back.
    pub fn lent(mapping: Arc<Mapping>, offset: u64, length: u64, lease: Box<dyn Any + Send + Sync>) -> Self {
        Self { mapping, offset, length, _lease: Some(lease) }
    }

    /// The mapping that it lies in.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Its first byte, from the start of the mapping.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its size in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }
}
