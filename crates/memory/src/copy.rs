//! Copies of a block or more: wide registers, whole lines.
//!
//! Where a processor has AVX-512 or AVX2, a plain loop of it moves 4 KiB that are not in the cache a tenth faster than libc's memcpy, which takes `rep movsb` from
//! some hundreds of bytes on (`examples/yardstick.rs` measures all three). Short copies, copies onto themselves and other processors take libc's.

/// From here on the loop pays.
#[cfg(target_arch = "x86_64")]
const WIDE: usize = 512;

/// Copies `length` bytes; the ranges may overlap.
///
/// # Safety
/// `from` is readable and `into` writable for `length` bytes, and nothing in Rust refers to either.
#[inline]
pub(crate) unsafe fn copy(from: *const u8, into: *mut u8, length: usize) {
    #[cfg(target_arch = "x86_64")]
    if length >= WIDE && (from as usize).abs_diff(into as usize) >= length {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the caller's promise; apart, as just seen; the processor has the instructions.
            return unsafe { widest(from, into, length) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { wide(from, into, length) };
        }
    }
    // SAFETY: the caller's promise; `copy` allows overlap.
    unsafe { std::ptr::copy(from, into, length) };
}

/// # Safety
/// As for [`copy`], with AVX-512 and ranges that lie apart.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn widest(from: *const u8, into: *mut u8, length: usize) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512, _mm512_storeu_si512};
    const STEP: usize = 256;
    let whole = length - length % STEP;
    for at in (0..whole).step_by(STEP) {
        // SAFETY: `at + STEP` is within `length`; unaligned loads and stores take any address.
        unsafe {
            let words: [__m512i; 4] = std::array::from_fn(|i| _mm512_loadu_si512(from.add(at + 64 * i).cast()));
            (0..4).for_each(|i| _mm512_storeu_si512(into.add(at + 64 * i).cast(), words[i]));
        }
    }
    // SAFETY: the rest is within `length`, and apart.
    unsafe { std::ptr::copy_nonoverlapping(from.add(whole), into.add(whole), length - whole) };
}

/// # Safety
/// As for [`copy`], with AVX2 and ranges that lie apart.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn wide(from: *const u8, into: *mut u8, length: usize) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_storeu_si256};
    const STEP: usize = 128;
    let whole = length - length % STEP;
    for at in (0..whole).step_by(STEP) {
        // SAFETY: `at + STEP` is within `length`; unaligned loads and stores take any address.
        unsafe {
            let words: [__m256i; 4] = std::array::from_fn(|i| _mm256_loadu_si256(from.add(at + 32 * i).cast()));
            (0..4).for_each(|i| _mm256_storeu_si256(into.add(at + 32 * i).cast(), words[i]));
        }
    }
    // SAFETY: the rest is within `length`, and apart.
    unsafe { std::ptr::copy_nonoverlapping(from.add(whole), into.add(whole), length - whole) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_at_any_distance_is_copied_as_memmove_does() {
        let pattern: Vec<u8> = (0..20_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        for length in [0, 1, 127, 511, 512, 513, 639, 640, 4095, 4096, 4097, 8192] {
            for (from, into) in [(0, 10_000), (10_000, 0), (3, 8_205), (100, 101), (101, 100), (0, 4096), (4096, 0), (5, 5), (0, 511)] {
                let (mut got, mut wanted) = (pattern.clone(), pattern.clone());
                wanted.copy_within(from..from + length, into);
                let base = got.as_mut_ptr();
                // SAFETY: both ranges lie in `got`, which nothing else refers to.
                unsafe { copy(base.add(from), base.add(into), length) };
                assert!(got == wanted, "{length} bytes from {from} to {into}");
                #[cfg(target_arch = "x86_64")]
                if from.abs_diff(into) >= length && std::arch::is_x86_feature_detected!("avx2") {
                    let mut got = pattern.clone();
                    let base = got.as_mut_ptr();
                    // SAFETY: as above; apart, and the processor has the instructions: also where wider ones are taken.
                    unsafe { wide(base.add(from), base.add(into), length) };
                    assert!(got == wanted, "AVX2: {length} bytes from {from} to {into}");
                }
            }
        }
    }
}
