//! Linux error numbers that the status tables name, positive (asm-generic; the same on x86-64, arm64 and riscv64).
//!
//! `libc` has them too, but `wire` depends on nothing that needs an operating system.

/// Operation not permitted.
pub const EPERM: i32 = 1;
/// No such file or directory.
pub const ENOENT: i32 = 2;
/// Input/output error.
pub const EIO: i32 = 5;
/// No such device or address.
pub const ENXIO: i32 = 6;
/// Resource temporarily unavailable.
pub const EAGAIN: i32 = 11;
/// Cannot allocate memory.
pub const ENOMEM: i32 = 12;
/// Permission denied.
pub const EACCES: i32 = 13;
/// Bad address.
pub const EFAULT: i32 = 14;
/// Device or resource busy.
pub const EBUSY: i32 = 16;
/// No such device.
pub const ENODEV: i32 = 19;
/// Invalid argument.
pub const EINVAL: i32 = 22;
/// File too large.
pub const EFBIG: i32 = 27;
/// No space left on device.
pub const ENOSPC: i32 = 28;
/// Read-only file system.
pub const EROFS: i32 = 30;
/// Broken pipe.
pub const EPIPE: i32 = 32;
/// Function not implemented.
pub const ENOSYS: i32 = 38;
/// Invalid exchange: what Linux reports for a reservation conflict.
pub const EBADE: i32 = 52;
/// No data available: what Linux reports for a medium error.
pub const ENODATA: i32 = 61;
/// Link has been severed.
pub const ENOLINK: i32 = 67;
/// Protocol error.
pub const EPROTO: i32 = 71;
/// Invalid or incomplete byte sequence: what Linux reports for failed protection information.
pub const EILSEQ: i32 = 84;
/// Operation not supported.
pub const EOPNOTSUPP: i32 = 95;
/// Connection reset by peer.
pub const ECONNRESET: i32 = 104;
/// Cannot send after transport endpoint shutdown.
pub const ESHUTDOWN: i32 = 108;
/// Connection timed out.
pub const ETIMEDOUT: i32 = 110;
/// Remote I/O error.
pub const EREMOTEIO: i32 = 121;
/// Disk quota exceeded.
pub const EDQUOT: i32 = 122;
/// Operation canceled.
pub const ECANCELED: i32 = 125;
