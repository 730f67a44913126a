//! The table of statuses: one row each, in the order of type and code.
//!
//! Errnos follow what Linux's block layer reports, except that a failed medium is EIO, which is what programs expect;
//! SCSI columns follow NVM Express' SCSI translation reference where it has a row. A write that finds no space is
//! "space allocation failed write protect", as thin-provisioned SCSI disks say it.

use super::{ScsiStatus, Sense, SenseKey, Status, StatusCodeType};
use crate::errno::*;
use crate::virtio_blk::BlkStatus;

/// What one status is in other protocols' words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The status.
    pub status: Status,
    /// Its name.
    pub name: &'static str,
    /// Positive errno, 0 for success.
    pub errno: i32,
    /// SCSI status and sense.
    pub sense: Sense,
    /// virtio-blk status byte.
    pub virtio: BlkStatus,
    /// One sentence without a full stop.
    pub sentence: &'static str,
}

macro_rules! statuses {
    ($( $name:ident = $sct:ident $sc:literal => $errno:expr, $scsi:ident $key:ident $asc:literal $ascq:literal, $virtio:ident, $sentence:literal; )+) => {
        impl Status {
            $( #[doc = concat!("\"", $sentence, "\".")]
               pub const $name: Self = Self::new(StatusCodeType::$sct, $sc); )+
        }

        /// Every status with a name, ordered by type and code.
        pub static TABLE: &[Row] = &[
            $( Row {
                status: Status::$name,
                name: stringify!($name),
                errno: $errno,
                sense: Sense { status: ScsiStatus::$scsi, key: SenseKey::$key, asc: $asc, ascq: $ascq },
                virtio: BlkStatus::$virtio,
                sentence: $sentence,
            }, )+
        ];
    };
}

statuses! {
    SUCCESS = GENERIC 0x00 => 0, GOOD NO_SENSE 0x00 0x00, OK,
        "the command succeeded";
    INVALID_OPCODE = GENERIC 0x01 => EOPNOTSUPP, CHECK_CONDITION ILLEGAL_REQUEST 0x20 0x00, UNSUPP,
        "the device does not know this operation";
    INVALID_FIELD = GENERIC 0x02 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "a field of the command has a value that the device refuses";
    COMMAND_ID_CONFLICT = GENERIC 0x03 => EIO, CHECK_CONDITION ABORTED_COMMAND 0x00 0x00, IOERR,
        "the command identifier is already in use";
    DATA_TRANSFER_ERROR = GENERIC 0x04 => EIO, CHECK_CONDITION HARDWARE_ERROR 0x44 0x00, IOERR,
        "data or metadata could not be transferred";
    ABORTED_POWER_LOSS = GENERIC 0x05 => EIO, TASK_ABORTED ABORTED_COMMAND 0x0b 0x08, IOERR,
        "the command was aborted because power is about to be lost";
    INTERNAL_DEVICE_ERROR = GENERIC 0x06 => EIO, CHECK_CONDITION HARDWARE_ERROR 0x44 0x00, IOERR,
        "the device failed internally";
    ABORT_REQUESTED = GENERIC 0x07 => ECANCELED, TASK_ABORTED ABORTED_COMMAND 0x00 0x00, IOERR,
        "the command was aborted on request";
    ABORTED_QUEUE_DELETED = GENERIC 0x08 => ECANCELED, TASK_ABORTED ABORTED_COMMAND 0x00 0x00, IOERR,
        "the command was aborted because its queue was deleted";
    ABORTED_FAILED_FUSED = GENERIC 0x09 => ECANCELED, TASK_ABORTED ABORTED_COMMAND 0x00 0x00, IOERR,
        "the command was aborted because the other half of the fused pair failed";
    ABORTED_MISSING_FUSED = GENERIC 0x0a => ECANCELED, TASK_ABORTED ABORTED_COMMAND 0x00 0x00, IOERR,
        "the command was aborted because the other half of the fused pair is missing";
    INVALID_NAMESPACE = GENERIC 0x0b => ENODEV, CHECK_CONDITION ILLEGAL_REQUEST 0x25 0x00, IOERR,
        "the device is gone or was never there";
    COMMAND_SEQUENCE_ERROR = GENERIC 0x0c => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x2c 0x00, IOERR,
        "the command came out of order";
    INVALID_SGL_DESCRIPTOR = GENERIC 0x0d => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "a scatter-gather segment descriptor is invalid";
    INVALID_SGL_COUNT = GENERIC 0x0e => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "the number of scatter-gather descriptors is invalid";
    INVALID_DATA_LENGTH = GENERIC 0x0f => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "the scatter-gather list is shorter or longer than the data";
    INVALID_METADATA_LENGTH = GENERIC 0x10 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "the metadata list is shorter or longer than the metadata";
    INVALID_SGL_TYPE = GENERIC 0x11 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "a scatter-gather descriptor has a type that the device does not know";
    INVALID_PRP_OFFSET = GENERIC 0x13 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "the offset in a page list is invalid";
    ATOMIC_WRITE_UNIT_EXCEEDED = GENERIC 0x14 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "the write is larger than what is atomic";
    OPERATION_DENIED = GENERIC 0x15 => EACCES, CHECK_CONDITION ILLEGAL_REQUEST 0x20 0x02, IOERR,
        "the operation is denied";
    INVALID_SGL_OFFSET = GENERIC 0x16 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "an offset in the scatter-gather list is invalid";
    HOST_ID_INCONSISTENT = GENERIC 0x18 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "two controllers were given host identifiers of different formats";
    KEEP_ALIVE_EXPIRED = GENERIC 0x19 => ETIMEDOUT, CHECK_CONDITION NOT_READY 0x04 0x00, IOERR,
        "the keep-alive time-out expired";
    KEEP_ALIVE_INVALID = GENERIC 0x1a => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "the keep-alive time-out is invalid";
    ABORTED_PREEMPT = GENERIC 0x1b => ECANCELED, TASK_ABORTED ABORTED_COMMAND 0x00 0x00, IOERR,
        "the command was aborted by a reservation that preempts";
    SANITIZE_FAILED = GENERIC 0x1c => EIO, CHECK_CONDITION MEDIUM_ERROR 0x31 0x03, IOERR,
        "the last sanitize failed, and the device must be recovered first";
    SANITIZE_IN_PROGRESS = GENERIC 0x1d => EBUSY, CHECK_CONDITION NOT_READY 0x04 0x1b, IOERR,
        "a sanitize is in progress";
    SGL_GRANULARITY_INVALID = GENERIC 0x1e => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "a scatter-gather block is of invalid granularity";
    NAMESPACE_WRITE_PROTECTED = GENERIC 0x20 => EROFS, CHECK_CONDITION DATA_PROTECT 0x27 0x00, IOERR,
        "the device is write protected";
    COMMAND_INTERRUPTED = GENERIC 0x21 => EAGAIN, BUSY NO_SENSE 0x00 0x00, IOERR,
        "the command was interrupted and may be tried again";
    TRANSIENT_TRANSPORT_ERROR = GENERIC 0x22 => ETIMEDOUT, CHECK_CONDITION ABORTED_COMMAND 0x00 0x00, IOERR,
        "the transport failed for a moment and the command may be tried again";
    LBA_OUT_OF_RANGE = GENERIC 0x80 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x21 0x00, IOERR,
        "the range passes the end of the device";
    CAPACITY_EXCEEDED = GENERIC 0x81 => ENOSPC, CHECK_CONDITION DATA_PROTECT 0x27 0x07, IOERR,
        "no space is left on the device";
    NAMESPACE_NOT_READY = GENERIC 0x82 => EAGAIN, CHECK_CONDITION NOT_READY 0x04 0x00, IOERR,
        "the device is not ready";
    RESERVATION_CONFLICT = GENERIC 0x83 => EBADE, RESERVATION_CONFLICT NO_SENSE 0x00 0x00, IOERR,
        "a reservation of another host forbids it";
    FORMAT_IN_PROGRESS = GENERIC 0x84 => EBUSY, CHECK_CONDITION NOT_READY 0x04 0x04, IOERR,
        "a format is in progress";
    CONFLICTING_ATTRIBUTES = COMMAND_SPECIFIC 0x80 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x1a 0x00, IOERR,
        "attributes of the command contradict each other";
    INVALID_PROTECTION_INFO = COMMAND_SPECIFIC 0x81 => EINVAL, CHECK_CONDITION ILLEGAL_REQUEST 0x24 0x00, IOERR,
        "the protection information settings are invalid";
    WRITE_TO_READ_ONLY_RANGE = COMMAND_SPECIFIC 0x82 => EROFS, CHECK_CONDITION DATA_PROTECT 0x27 0x00, IOERR,
        "the range is read-only";
    ZONE_BOUNDARY_ERROR = COMMAND_SPECIFIC 0xb8 => EIO, CHECK_CONDITION ILLEGAL_REQUEST 0x21 0x07, IOERR,
        "the range passes the end of its zone";
    ZONE_IS_FULL = COMMAND_SPECIFIC 0xb9 => EIO, CHECK_CONDITION ILLEGAL_REQUEST 0x21 0x05, IOERR,
        "the zone is full";
    ZONE_IS_READ_ONLY = COMMAND_SPECIFIC 0xba => EROFS, CHECK_CONDITION DATA_PROTECT 0x27 0x08, IOERR,
        "the zone is read-only";
    ZONE_IS_OFFLINE = COMMAND_SPECIFIC 0xbb => EIO, CHECK_CONDITION DATA_PROTECT 0x2c 0x0e, IOERR,
        "the zone is offline";
    ZONE_INVALID_WRITE = COMMAND_SPECIFIC 0xbc => EIO, CHECK_CONDITION ILLEGAL_REQUEST 0x21 0x04, ZONE_UNALIGNED_WP,
        "the write does not start at the write pointer of the zone";
    TOO_MANY_ACTIVE_ZONES = COMMAND_SPECIFIC 0xbd => EIO, CHECK_CONDITION DATA_PROTECT 0x0e 0x10, ZONE_ACTIVE_RESOURCE,
        "too many zones are active";
    TOO_MANY_OPEN_ZONES = COMMAND_SPECIFIC 0xbe => EIO, CHECK_CONDITION DATA_PROTECT 0x0e 0x11, ZONE_OPEN_RESOURCE,
        "too many zones are open";
    ZONE_INVALID_STATE_TRANSITION = COMMAND_SPECIFIC 0xbf => EIO, CHECK_CONDITION ILLEGAL_REQUEST 0x2c 0x0d, ZONE_INVALID_CMD,
        "the zone cannot go to the state that was asked for";
    WRITE_FAULT = MEDIA 0x80 => EIO, CHECK_CONDITION MEDIUM_ERROR 0x03 0x00, IOERR,
        "the medium failed a write";
    UNRECOVERED_READ_ERROR = MEDIA 0x81 => EIO, CHECK_CONDITION MEDIUM_ERROR 0x11 0x00, IOERR,
        "the medium failed a read";
    GUARD_CHECK_ERROR = MEDIA 0x82 => EILSEQ, CHECK_CONDITION ABORTED_COMMAND 0x10 0x01, IOERR,
        "the checksum of a block is wrong";
    APPLICATION_TAG_CHECK_ERROR = MEDIA 0x83 => EILSEQ, CHECK_CONDITION ABORTED_COMMAND 0x10 0x02, IOERR,
        "the application tag of a block is wrong";
    REFERENCE_TAG_CHECK_ERROR = MEDIA 0x84 => EILSEQ, CHECK_CONDITION ABORTED_COMMAND 0x10 0x03, IOERR,
        "the reference tag of a block is wrong";
    COMPARE_FAILURE = MEDIA 0x85 => EILSEQ, CHECK_CONDITION MISCOMPARE 0x1d 0x00, IOERR,
        "the data differ from what was compared";
    ACCESS_DENIED = MEDIA 0x86 => EACCES, CHECK_CONDITION ILLEGAL_REQUEST 0x20 0x02, IOERR,
        "access is denied";
    UNWRITTEN_BLOCK = MEDIA 0x87 => EIO, CHECK_CONDITION MEDIUM_ERROR 0x11 0x00, IOERR,
        "a block was read that is deallocated or was never written";
    INTERNAL_PATH_ERROR = PATH 0x00 => EIO, CHECK_CONDITION HARDWARE_ERROR 0x44 0x00, IOERR,
        "the path to the device failed internally";
    ANA_PERSISTENT_LOSS = PATH 0x01 => ENXIO, CHECK_CONDITION NOT_READY 0x04 0x0c, IOERR,
        "the device cannot be reached on this path any more";
    ANA_INACCESSIBLE = PATH 0x02 => ENXIO, CHECK_CONDITION NOT_READY 0x04 0x0c, IOERR,
        "the device cannot be reached on this path";
    ANA_TRANSITION = PATH 0x03 => EAGAIN, CHECK_CONDITION NOT_READY 0x04 0x0a, IOERR,
        "the path changes its state";
    CONTROLLER_PATH_ERROR = PATH 0x60 => EIO, CHECK_CONDITION HARDWARE_ERROR 0x44 0x00, IOERR,
        "the controller found a path error";
    HOST_PATH_ERROR = PATH 0x70 => ENOLINK, CHECK_CONDITION ABORTED_COMMAND 0x00 0x00, IOERR,
        "the connection to the device is lost";
    ABORTED_BY_HOST = PATH 0x71 => ECANCELED, TASK_ABORTED ABORTED_COMMAND 0x00 0x00, IOERR,
        "the host aborted the command";
}
