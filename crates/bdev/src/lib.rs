//! bdev
