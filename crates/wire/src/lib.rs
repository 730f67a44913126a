//! Wire structures of the protocols qpair speaks, declared once and checked by the compiler.
//!
//! Specifications: Virtio 1.2 (OASIS), the vhost-user protocol as QEMU's documentation states it, NVMe Base 2.0c.
//!
//! Every structure is `#[repr(C)]` over little-endian, unaligned fields of [`zerocopy`], so that bytes copied out of
//! shared memory become a value without arithmetic and without `unsafe`; sizes and offsets are asserted at compile
//! time. Numbers that a peer chooses are *open enums*: every value can be held, the known ones have names. Bit sets
//! are `bitflags` and keep unknown bits.
//!
//! Errors: none. A wire structure can hold anything; who uses it checks it and refuses by name.
//!
//! Not implemented: big-endian (legacy) virtio, zoned block device requests.
//!
//! Limits: those of the field widths.

#![no_std]
#![forbid(unsafe_code)]

mod open_enum;

pub mod errno;
pub mod nvme;
pub mod raid_superblock;
pub mod vhost_user;
pub mod virtio;
pub mod virtio_blk;
pub mod virtio_packed;
