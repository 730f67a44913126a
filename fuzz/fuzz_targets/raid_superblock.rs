//! A RAID superblock of any content: it is refused, or it is written again as it was.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qpair_wire::raid_superblock::{Error, LENGTH_MAX, decode, encode};

/// What `decode` gives for bytes whose signature and checksum are right, so that the fields behind them are reached too.
fn mended(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    if bytes.len() >= 256 {
        bytes[..8].copy_from_slice(b"SPDKRAID");
        let length = 256 + 64 * usize::from(bytes[255]);
        bytes[12..16].copy_from_slice(&(length as u32).to_le_bytes());
        bytes.resize(bytes.len().max(length), 0);
        if let Err(Error::Checksum { computed, .. }) = decode(&bytes) {
            bytes[16..20].copy_from_slice(&computed.to_le_bytes());
        }
    }
    bytes
}

fuzz_target!(|data: &[u8]| {
    let _ = decode(data);
    let bytes = mended(data);
    if let Ok((header, bases)) = decode(&bytes) {
        let mut out = [0; LENGTH_MAX];
        let length = encode(header, bases, &mut out).expect("what was read can be written");
        assert_eq!(decode(&out[..length]).map(|(_, again)| again), Ok(bases));
    }
});
