//! The simulated device and the front ends that these tests use; the device and the random client are those of qpair-bdev's own tests.
#![allow(dead_code)]

#[path = "../../../bdev/tests/common/base.rs"]
mod base;
#[path = "../../../bdev/tests/common/client.rs"]
pub mod client;
pub mod desk;
#[allow(unused_imports, reason = "each test uses some")]
pub use base::*;
