//! Sums over what in a qcow2 file is not a disk's data: header, tables, reference counts, and what lies between.
//!
//! With the records over the data this covers every byte of the file once, so that a check finds any flip, also one
//! that no reader would ever stumble upon.

use crate::error::stored;
use stillpoint_image::{Layer, Mapping};
use stillpoint_model::{Length, Offset, Range};
use stillpoint_provider::Result;

/// The sum over `layer`'s file without its data, in hex.
pub(crate) fn tables_sum(layer: &Layer) -> Result<String> {
    let mut data: Vec<(u64, u64)> = Vec::new();
    let mut at = Offset::ZERO;
    while let Some((range, mapping)) = layer.mapping(at).map_err(stored)? {
        if let Mapping::Data(host) = mapping {
            let (start, end) = (host.get(), host.get().saturating_add(range.length().get()));
            match data.last_mut() {
                // Clusters were written in the order of the disk, so there are few breaks.
                Some(last) if last.1 == start => last.1 = end,
                _ => data.push((start, end)),
            }
        }
        at = range.end();
    }
    data.sort_unstable();
    let length = layer.file_length().map_err(stored)?.get();
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    for (start, end) in data.into_iter().chain([(length, length)]) {
        hash_between(layer, &mut hasher, at, start.min(length))?;
        at = at.max(end);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn hash_between(layer: &Layer, hasher: &mut blake3::Hasher, start: u64, end: u64) -> Result<()> {
    let Ok(range) = Range::between(Offset::new(start), Offset::new(end)) else { return Ok(()) };
    hasher.update(&start.to_le_bytes());
    let mut bytes = Vec::new();
    for part in range.chunks(Length::new(256 << 10)) {
        bytes.resize(usize::try_from(part.length().get()).unwrap_or_default(), 0);
        layer.read_file(part.start(), &mut bytes).map_err(stored)?;
        hasher.update(&bytes);
    }
    Ok(())
}
