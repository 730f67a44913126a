//! Status packing and its tables.

use proptest::prelude::*;
use qpair_wire::errno::*;
use qpair_wire::nvme::{ScsiStatus, SenseKey, Status, StatusCodeType, TABLE};
use qpair_wire::virtio_blk::BlkStatus;

#[test]
fn success_is_zero_and_no_error_whatever_its_upper_bits() {
    assert_eq!(Status::SUCCESS.bits(), 0);
    assert!(!Status::SUCCESS.is_error());
    assert!(!Status::from_bits(0x7800).is_error());
    assert_eq!(Status::from_bits(0x7800).to_errno(), 0);
    assert_eq!(Status::from_bits(0x7800).to_virtio_blk(), BlkStatus::OK);
}

#[test]
fn a_completion_field_carries_the_phase_in_its_lowest_bit() {
    // DNR, type 2, code 0x81, phase 1.
    let status = Status::from_completion(0x8503);
    assert_eq!((status.sct(), status.sc()), (StatusCodeType::MEDIA, 0x81));
    assert!(status.do_not_retry() && !status.more());
    assert_eq!(status.code(), Status::UNRECOVERED_READ_ERROR);
    assert_eq!(status.to_completion(true), 0x8503);
    assert_eq!(status.to_completion(false), 0x8502);
}

#[test]
fn each_status_has_one_row_and_rows_are_ordered() {
    assert!(TABLE.windows(2).all(|pair| pair[0].status.bits() < pair[1].status.bits()));
    assert_eq!(TABLE[0].status, Status::SUCCESS);
}

#[test]
fn every_error_of_the_table_is_an_error_in_every_protocol() {
    for row in &TABLE[1..] {
        assert!(row.status.is_error(), "{}", row.name);
        assert!(row.errno > 0, "{}", row.name);
        assert_ne!(row.virtio, BlkStatus::OK, "{}", row.name);
        assert_ne!(row.sense.status, ScsiStatus::GOOD, "{}", row.name);
        let has_sense = matches!(row.sense.status, ScsiStatus::CHECK_CONDITION);
        assert!(!has_sense || row.sense.key != SenseKey::NO_SENSE, "{}", row.name);
        assert!(!row.sentence.ends_with('.') && row.sentence.len() > 10, "{}", row.name);
    }
}

#[test]
fn the_statuses_that_callers_know_map_as_they_expect() {
    assert_eq!(Status::CAPACITY_EXCEEDED.to_errno(), ENOSPC);
    assert_eq!(Status::INVALID_OPCODE.to_virtio_blk(), BlkStatus::UNSUPP);
    assert_eq!(Status::INVALID_OPCODE.to_errno(), EOPNOTSUPP);
    assert_eq!(Status::NAMESPACE_WRITE_PROTECTED.to_errno(), EROFS);
    let sense = Status::LBA_OUT_OF_RANGE.to_sense();
    assert_eq!((sense.status, sense.key, sense.asc), (ScsiStatus::CHECK_CONDITION, SenseKey::ILLEGAL_REQUEST, 0x21));
    let sense = Status::UNRECOVERED_READ_ERROR.to_sense();
    assert_eq!((sense.key, sense.asc, sense.ascq), (SenseKey::MEDIUM_ERROR, 0x11, 0));
    assert_eq!(Status::RESERVATION_CONFLICT.to_sense().status, ScsiStatus::RESERVATION_CONFLICT);
    assert_eq!(Status::ABORT_REQUESTED.to_sense().status, ScsiStatus::TASK_ABORTED);
}

#[test]
fn a_status_without_a_name_fails_like_its_type() {
    let vendor = Status::new(StatusCodeType::VENDOR, 0x42);
    assert_eq!((vendor.to_errno(), vendor.to_virtio_blk()), (EIO, BlkStatus::IOERR));
    assert_eq!(vendor.sentence(), "the device gave a vendor specific status");
    let media = Status::new(StatusCodeType::MEDIA, 0xee);
    assert_eq!(media.to_sense().key, SenseKey::MEDIUM_ERROR);
    assert_eq!(format!("{media:?}"), "MEDIA(0xee)");
}

#[test]
fn errnos_that_layers_rely_on_come_back_as_themselves() {
    for errno in [EINVAL, EOPNOTSUPP, ENOSPC, EROFS, EACCES, ENODEV, ECANCELED, EAGAIN, ETIMEDOUT, EILSEQ, EBADE, EIO, ENOLINK] {
        assert_eq!(Status::from_errno(errno).to_errno(), errno);
    }
    assert_eq!(Status::from_errno(0), Status::SUCCESS);
}

#[test]
fn a_status_prints_its_name_and_its_sentence() {
    assert_eq!(format!("{:?}", Status::WRITE_FAULT.with_do_not_retry()), "WRITE_FAULT+DNR");
    assert_eq!(format!("{}", Status::WRITE_FAULT), "the medium failed a write (sct 0x2, sc 0x80)");
}

proptest! {
    #[test]
    fn packing_keeps_every_bit(bits in 0u16..0x8000, phase: bool) {
        let status = Status::from_bits(bits);
        prop_assert_eq!(Status::from_completion(status.to_completion(phase)), status);
        prop_assert_eq!(Status::new(status.sct(), status.sc()), status.code());
    }

    #[test]
    fn an_error_stays_an_error_through_every_table(bits in 0u16..0x8000) {
        let status = Status::from_bits(bits);
        prop_assert_eq!(status.to_errno() != 0, status.is_error());
        prop_assert_eq!(status.to_virtio_blk() != BlkStatus::OK, status.is_error());
        prop_assert_eq!(status.to_sense().status != ScsiStatus::GOOD, status.is_error());
        prop_assert!(!status.sentence().is_empty());
    }

    #[test]
    fn every_errno_but_zero_is_an_error(errno in 1i32..4096) {
        prop_assert!(Status::from_errno(errno).is_error());
        prop_assert!(Status::from_errno(-errno).is_error());
    }

    #[test]
    fn every_virtio_failure_is_an_error(byte in 1u8..) {
        prop_assert!(Status::from_virtio_blk(BlkStatus(byte)).is_error());
    }
}
