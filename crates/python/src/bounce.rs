//! Memory for one I/O of Python's: its data, and behind them its metadata.

use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;
use qpair_bdev::{Info, Op};
use qpair_memory::Region;

use crate::io::IO_BYTES_MAX;
use crate::pool::{Pool, Pooled};
use crate::values::Failure;

/// See the module's doc. Lengths in bytes.
pub struct Bounce {
    pub memory: Pooled,
    pub data: u32,
    pub metadata: Option<u32>,
    /// A read is shown to Python in place, not copied.
    pub view: bool,
}

impl Bounce {
    /// For an operation on so many blocks, filled with what it writes or compares. None: it has no data. `metadata`: given where metadata
    /// are to be moved too; for a read anything but None will do.
    pub fn new(
        pool: &Arc<Pool>,
        info: &Info,
        op: Op,
        blocks: u64,
        data: Option<&Bound<'_, PyAny>>,
        metadata: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Self>> {
        let times = match op {
            Op::Read | Op::Write | Op::Compare | Op::ZoneAppend => 1,
            Op::CompareAndWrite => 2,
            _ => return Ok(None),
        };
        let each = match metadata {
            None => 0,
            Some(_) if info.metadata_bytes == 0 => {
                return Err(Failure::invalid("metadata", "given", format_args!("bdev {} has none", info.name)).into());
            }
            Some(_) => info.metadata_bytes,
        };
        let limit = IO_BYTES_MAX / times / u64::from(info.block_size + each);
        if blocks > limit {
            return Err(Failure::invalid("num_blocks", blocks, format_args!("at most {limit} in one I/O ({IO_BYTES_MAX} bytes)")).into());
        }
        let (bytes, apart) = (times * blocks * u64::from(info.block_size), blocks * u64::from(each));
        let length = (bytes + apart) as usize;
        // A device may leave what it reads into as it is (null does), and that would be another I/O's data.
        let memory = if op == Op::Read { pool.zeroed(length) } else { pool.take(length) }.map_err(Failure::from)?;
        if op != Op::Read {
            let Some(data) = data else { return Err(Failure::invalid("data", "None", "a write needs a buffer").into()) };
            let region = memory.region();
            fill("data", data, &region, 0, bytes)?;
            if let Some(metadata) = metadata {
                fill("metadata", metadata, &region, bytes, apart)?;
            }
        }
        Ok(Some(Self { memory, data: bytes as u32, metadata: metadata.map(|_| apart as u32), view: false }))
    }
}

/// Copies a Python buffer to its place. Any item format: what counts is the bytes; refused by memoryview if they do not lie in one piece.
fn fill(field: &str, object: &Bound<'_, PyAny>, region: &Region, offset: u64, length: u64) -> PyResult<()> {
    let bytes = PyMemoryView::from(object)?.call_method1("cast", ("B",))?;
    let buffer = PyBuffer::<u8>::get(&bytes)?;
    if buffer.len_bytes() as u64 != length {
        return Err(Failure::invalid(field, format_args!("of {} bytes", buffer.len_bytes()), format_args!("{length} bytes")).into());
    }
    let into = region.pointer(offset, length).map_err(Failure::from)?;
    // SAFETY: `buf_ptr` is good for `len_bytes` bytes as long as `buffer` lives, contiguous because it is a cast
    // memoryview; `into` is good for as many, in a mapping that nobody else has a hold on. Raw pointers throughout: another
    // Python thread without the GIL may write to the source, and the copy then has some mixture of its bytes.
    unsafe { std::ptr::copy_nonoverlapping(buffer.buf_ptr().cast::<u8>().cast_const(), into, buffer.len_bytes()) };
    Ok(())
}
