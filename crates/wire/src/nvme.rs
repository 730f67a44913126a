//! NVMe status: the one result that every I/O of qpair carries, and what it is in other protocols' words.
//!
//! NVMe Base 2.0c, 4.2.3 (status field; figures of generic, command specific, media and path codes); NVM Command Set
//! 1.0c for its command specific codes; SCSI SAM-6 and SPC-6 for status and sense; Virtio 1.2, 5.2.6.
//!
//! A [`Status`] is 16 bits: code in 7:0, type in 10:8, then CRD, More and Do Not Retry as in the completion queue entry
//! without its phase bit. [`TABLE`] has a row for each status with a name: errno, SCSI status and sense,
//! virtio-blk status byte, a sentence. A status without a row is answered like its type's first failure. The way back,
//! [`Status::from_errno`], is a table of its own, because many statuses share an errno.
//!
//! Errors: none here.
//!
//! Not implemented: admin command specific codes (the room that speaks them adds rows).
//!
//! Limits: lookups walk the table, since only failures look.

mod table;

use crate::errno as os;
use crate::open_enum::open_enum;
use crate::virtio_blk::BlkStatus;
use core::fmt;
pub use table::{Row, TABLE};

open_enum! {
    /// Status code type (4.2.3.1).
    pub enum StatusCodeType: u8 {
        /// Codes that all commands share.
        GENERIC = 0,
        /// Codes with a meaning of their own for a command.
        COMMAND_SPECIFIC = 1,
        /// Media and data integrity errors.
        MEDIA = 2,
        /// The way to the namespace.
        PATH = 3,
        /// The vendor's.
        VENDOR = 7,
    }
}

open_enum! {
    /// Status of a SCSI command (SAM-6, 5.3).
    pub enum ScsiStatus: u8 {
        /// Done.
        GOOD = 0x00,
        /// Look at the sense data.
        CHECK_CONDITION = 0x02,
        /// Not now.
        BUSY = 0x08,
        /// Somebody else's reservation.
        RESERVATION_CONFLICT = 0x18,
        /// No room in the queue.
        TASK_SET_FULL = 0x28,
        /// Aborted by another initiator.
        TASK_ABORTED = 0x40,
    }
}

open_enum! {
    /// Sense key (SPC-6, 4.5.7).
    pub enum SenseKey: u8 {
        /// Nothing to tell.
        NO_SENSE = 0x0,
        /// Done, with help.
        RECOVERED_ERROR = 0x1,
        /// Cannot be reached.
        NOT_READY = 0x2,
        /// The medium is bad.
        MEDIUM_ERROR = 0x3,
        /// The device is bad.
        HARDWARE_ERROR = 0x4,
        /// The command is bad.
        ILLEGAL_REQUEST = 0x5,
        /// Something changed.
        UNIT_ATTENTION = 0x6,
        /// Protected.
        DATA_PROTECT = 0x7,
        /// Blank where data was expected.
        BLANK_CHECK = 0x8,
        /// Ended by the device.
        ABORTED_COMMAND = 0xb,
        /// Data differ.
        MISCOMPARE = 0xe,
    }
}

/// What a status is in SCSI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// Status byte.
    pub status: ScsiStatus,
    /// Sense key.
    pub key: SenseKey,
    /// Additional sense code.
    pub asc: u8,
    /// Additional sense code qualifier.
    pub ascq: u8,
}

/// Result of an I/O: the 15 bits of a completion's status field, in bits 14:0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, zerocopy::FromZeros)]
#[repr(transparent)]
pub struct Status(u16);

const DO_NOT_RETRY: u16 = 1 << 14;
const MORE: u16 = 1 << 13;
const CODE_MASK: u16 = 0x7ff;

impl Status {
    /// Of a type and a code.
    #[must_use]
    pub const fn new(sct: StatusCodeType, sc: u8) -> Self {
        Self(((sct.0 as u16 & 0x7) << 8) | sc as u16)
    }

    /// Of its 16 bits; bit 15 is dropped.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & 0x7fff)
    }

    /// Its 16 bits.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Of the upper half of a completion's dword 3, where the phase is bit 0.
    #[must_use]
    pub const fn from_completion(field: u16) -> Self {
        Self(field >> 1)
    }

    /// The upper half of a completion's dword 3 with this phase.
    #[must_use]
    pub const fn to_completion(self, phase: bool) -> u16 {
        (self.0 << 1) | phase as u16
    }

    /// Status code type.
    #[must_use]
    pub const fn sct(self) -> StatusCodeType {
        StatusCodeType((self.0 >> 8) as u8 & 0x7)
    }

    /// Status code.
    #[must_use]
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// Type and code alone.
    #[must_use]
    pub const fn code(self) -> Self {
        Self(self.0 & CODE_MASK)
    }

    /// Anything but success. CRD, More and Do Not Retry do not matter.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & CODE_MASK != 0
    }

    /// The same command would fail again.
    #[must_use]
    pub const fn do_not_retry(self) -> bool {
        self.0 & DO_NOT_RETRY != 0
    }

    /// More about it is in the error log.
    #[must_use]
    pub const fn more(self) -> bool {
        self.0 & MORE != 0
    }

    /// This status, not to be retried.
    #[must_use]
    pub const fn with_do_not_retry(self) -> Self {
        Self(self.0 | DO_NOT_RETRY)
    }

    /// Its row of [`TABLE`], or its type's first failure for a code without a name.
    #[must_use]
    pub fn row(self) -> &'static Row {
        let code = self.code();
        if let Some(row) = TABLE.iter().find(|row| row.status == code) {
            return row;
        }
        let stand_in = match self.sct() {
            StatusCodeType::COMMAND_SPECIFIC => Self::INVALID_FIELD,
            StatusCodeType::MEDIA => Self::UNRECOVERED_READ_ERROR,
            StatusCodeType::PATH => Self::INTERNAL_PATH_ERROR,
            _ => Self::INTERNAL_DEVICE_ERROR,
        };
        TABLE.iter().find(|row| row.status == stand_in).unwrap_or(&TABLE[0])
    }

    /// The name of a status that has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        TABLE.iter().find(|row| row.status == self.code()).map(|row| row.name)
    }

    /// Positive errno, 0 for success.
    #[must_use]
    pub fn to_errno(self) -> i32 {
        if self.is_error() { self.row().errno } else { 0 }
    }

    /// SCSI status and sense.
    #[must_use]
    pub fn to_sense(self) -> Sense {
        self.row().sense
    }

    /// The status byte of virtio-blk.
    #[must_use]
    pub fn to_virtio_blk(self) -> BlkStatus {
        if self.is_error() { self.row().virtio } else { BlkStatus::OK }
    }

    /// One readable sentence without a full stop.
    #[must_use]
    pub fn sentence(self) -> &'static str {
        if self.is_error() && self.name().is_none() {
            return match self.sct() {
                StatusCodeType::GENERIC => "the device gave a generic status without a name",
                StatusCodeType::COMMAND_SPECIFIC => "the device gave a command specific status without a name",
                StatusCodeType::MEDIA => "the device gave a media error without a name",
                StatusCodeType::PATH => "the path to the device gave a status without a name",
                StatusCodeType::VENDOR => "the device gave a vendor specific status",
                _ => "the device gave a status of a reserved type",
            };
        }
        self.row().sentence
    }

    /// The status for what an operating system call failed with. Positive errno; 0 is success.
    #[must_use]
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            0 => Self::SUCCESS,
            os::EINVAL | os::EFBIG => Self::INVALID_FIELD,
            os::EFAULT => Self::DATA_TRANSFER_ERROR,
            os::EOPNOTSUPP | os::ENOSYS => Self::INVALID_OPCODE,
            os::ENOSPC | os::EDQUOT => Self::CAPACITY_EXCEEDED,
            os::EROFS => Self::NAMESPACE_WRITE_PROTECTED,
            os::EPERM | os::EACCES => Self::ACCESS_DENIED,
            os::ENODEV | os::ENXIO | os::ENOENT => Self::INVALID_NAMESPACE,
            os::ECANCELED => Self::ABORT_REQUESTED,
            os::EAGAIN | os::EBUSY | os::ENOMEM => Self::COMMAND_INTERRUPTED,
            os::ETIMEDOUT => Self::TRANSIENT_TRANSPORT_ERROR,
            os::ENODATA => Self::UNRECOVERED_READ_ERROR,
            os::EILSEQ => Self::GUARD_CHECK_ERROR,
            os::EBADE => Self::RESERVATION_CONFLICT,
            os::ECONNRESET | os::EPIPE | os::ESHUTDOWN | os::ENOLINK => Self::HOST_PATH_ERROR,
            _ => Self::INTERNAL_DEVICE_ERROR,
        }
    }

    /// The status of a virtio-blk status byte.
    #[must_use]
    pub const fn from_virtio_blk(status: BlkStatus) -> Self {
        match status {
            BlkStatus::OK => Self::SUCCESS,
            BlkStatus::UNSUPP => Self::INVALID_OPCODE,
            BlkStatus::ZONE_INVALID_CMD => Self::ZONE_INVALID_STATE_TRANSITION,
            BlkStatus::ZONE_UNALIGNED_WP => Self::ZONE_INVALID_WRITE,
            BlkStatus::ZONE_OPEN_RESOURCE => Self::TOO_MANY_OPEN_ZONES,
            BlkStatus::ZONE_ACTIVE_RESOURCE => Self::TOO_MANY_ACTIVE_ZONES,
            _ => Self::INTERNAL_DEVICE_ERROR,
        }
    }
}

impl Default for Status {
    fn default() -> Self {
        Self::SUCCESS
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name)?,
            None => write!(f, "{:?}({:#04x})", self.sct(), self.sc())?,
        }
        if self.do_not_retry() { f.write_str("+DNR") } else { Ok(()) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (sct {:#x}, sc {:#04x})", self.sentence(), self.sct().0, self.sc())
    }
}
