//! Packs: files of some megabytes that hold blobs, and the saver that fills and writes them.
//!
//! A pack is its blobs one after the other, an encrypted header that names them, and the header's length
//! (restic's design document, "Pack Format").

use crate::{
    blob::{BlobKind, Id},
    crypto::{self, SealedBlob},
    error::{damaged, stored},
    index::{self, IndexBlob, IndexPack},
    repository::Repository,
    store::Folder,
};
use bytes::{Buf as _, BytesMut};
use sha2::{Digest as _, Sha256};
use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::task::JoinSet;

/// A pack is written once it has so many bytes. Few large files suit object stores, and `fsync`.
const PACK_SIZE: usize = 16 << 20;
/// Less than this waits for what is added at the end, rather than to be a file of its own.
const LITTLE: usize = 4 << 20;
/// Packs being written at once, which are held in memory.
const WRITES: usize = 3;
/// What a pack grows to, with its last blob and its header: room for it is taken once and used again.
const ROOM: usize = PACK_SIZE + (9 << 20);
/// What its memory begins on a multiple of, so that it can be written past the page cache as it is.
const ALIGNMENT: usize = 4096;
/// An index is written so often, so that the next run finds what an interrupted one has stored.
const INDEX_EVERY: Duration = Duration::from_secs(30);
/// Entries of a header: kind, length, (length before compression,) id.
const ENTRY: usize = 37;
const COMPRESSED_ENTRY: usize = 41;

/// A pack that is being filled.
#[derive(Default)]
struct Pack {
    blobs: Vec<IndexBlob>,
    /// The blobs, one after the other. Each is copied here while it is still in the processor's cache.
    bytes: BytesMut,
}

impl Pack {
    fn add(&mut self, kind: BlobKind, id: Id, sealed: SealedBlob) -> Result<()> {
        let large = |_| Error::new(ErrorKind::Io, "a blob is too large for a pack");
        self.blobs.push(IndexBlob {
            id,
            kind,
            offset: u32::try_from(self.bytes.len()).map_err(large)?,
            length: u32::try_from(sealed.bytes.len()).map_err(large)?,
            uncompressed_length: sealed.uncompressed.and_then(NonZeroU32::new),
        });
        self.bytes.extend_from_slice(&sealed.bytes);
        Ok(())
    }

    /// Writes it; its memory comes back, to be used again.
    fn write(mut self, repository: &Repository) -> Result<(IndexPack, BytesMut)> {
        let header = repository.key.encrypt(&header(&self.blobs))?;
        let length = u32::try_from(header.len())
            .map_err(|_| Error::new(ErrorKind::Io, "a pack has too many blobs"))?;
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        let bytes = self.bytes.freeze();
        let id = Id::new(Sha256::digest(&bytes).into());
        stillpoint_failpoint::reached("restic-pack");
        let written = repository.store.write(Folder::Data, &id.to_string(), std::slice::from_ref(&bytes));
        written.map_err(|error| stored("cannot write a pack", error))?;
        // A store that still has it keeps it.
        Ok((IndexPack { id, blobs: self.blobs }, bytes.try_into_mut().unwrap_or_default()))
    }
}

/// Empty memory for a pack.
fn room() -> BytesMut {
    let mut room = BytesMut::zeroed(ROOM + ALIGNMENT);
    let into_page = room.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    room.advance(into_page);
    room.clear();
    room
}

/// A header, before encryption.
fn header(blobs: &[IndexBlob]) -> Vec<u8> {
    let mut header = Vec::with_capacity(blobs.len().saturating_mul(COMPRESSED_ENTRY));
    for blob in blobs {
        let kind = match (blob.kind, blob.uncompressed_length) {
            (BlobKind::Data, None) => 0,
            (BlobKind::Tree, None) => 1,
            (BlobKind::Data, Some(_)) => 2,
            (BlobKind::Tree, Some(_)) => 3,
        };
        header.push(kind);
        header.extend(blob.length.to_le_bytes());
        if let Some(length) = blob.uncompressed_length {
            header.extend(length.get().to_le_bytes());
        }
        header.extend(blob.id.bytes());
    }
    header
}

/// The blobs that a pack says that it holds.
pub(crate) fn read_header(key: &crypto::Key, pack: &[u8]) -> Result<Vec<IndexBlob>> {
    let wrong = || damaged("its header is none");
    let (rest, length) = pack.split_last_chunk::<4>().ok_or_else(wrong)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| wrong())?;
    let start = rest.len().checked_sub(length).ok_or_else(wrong)?;
    let header = key.decrypt(rest.get(start..).ok_or_else(wrong)?)?;
    let (mut header, mut blobs, mut offset) = (header.as_slice(), Vec::new(), 0u32);
    while let Some((&kind, after)) = header.split_first() {
        let (length, after) = after.split_first_chunk::<4>().ok_or_else(wrong)?;
        let length = u32::from_le_bytes(*length);
        let (uncompressed_length, after) = if kind & 2 == 0 {
            (None, after)
        } else {
            let (length, after) = after.split_first_chunk::<4>().ok_or_else(wrong)?;
            (NonZeroU32::new(u32::from_le_bytes(*length)), after)
        };
        let (id, after) = after.split_first_chunk::<32>().ok_or_else(wrong)?;
        let kind = match kind {
            0 | 2 => BlobKind::Data,
            1 | 3 => BlobKind::Tree,
            _ => return Err(wrong()),
        };
        blobs.push(IndexBlob { id: Id::new(*id), kind, offset, length, uncompressed_length });
        offset = offset.checked_add(length).ok_or_else(wrong)?;
        header = after;
    }
    Ok(blobs)
}

/// The length of a pack that holds `blobs`.
pub(crate) fn length(blobs: &[IndexBlob]) -> u64 {
    let entry = |blob: &IndexBlob| {
        let entry = if blob.uncompressed_length.is_some() { COMPRESSED_ENTRY } else { ENTRY };
        u64::from(blob.length).saturating_add(entry as u64)
    };
    blobs.iter().map(entry).sum::<u64>().saturating_add(crypto::OVERHEAD as u64).saturating_add(4)
}

/// Puts blobs into packs and packs into the repository, in the background.
pub(crate) struct Saver {
    repository: Arc<Repository>,
    data: Pack,
    trees: Pack,
    writes: JoinSet<Result<(IndexPack, BytesMut)>>,
    /// Memory of packs that are written.
    spare: Vec<BytesMut>,
    /// Written, but in no index yet.
    written: Vec<IndexPack>,
    last_index: Instant,
    /// Bytes of all blobs added.
    added: u64,
}

impl Saver {
    pub(crate) fn new(repository: Arc<Repository>) -> Self {
        Self {
            repository,
            data: Pack::default(),
            trees: Pack::default(),
            writes: JoinSet::new(),
            spare: Vec::new(),
            written: Vec::new(),
            last_index: Instant::now(),
            added: 0,
        }
    }

    /// Bytes of all blobs added so far, as they are in packs.
    pub(crate) fn added(&self) -> u64 {
        self.added
    }

    /// Adds a blob. Waits while too many packs are being written.
    pub(crate) async fn add(&mut self, kind: BlobKind, id: Id, sealed: SealedBlob) -> Result<()> {
        self.added = self.added.saturating_add(sealed.bytes.len() as u64);
        let pack = match kind {
            BlobKind::Data => {
                if self.data.bytes.capacity() == 0 {
                    self.data.bytes = self.spare.pop().unwrap_or_else(room);
                }
                &mut self.data
            }
            BlobKind::Tree => &mut self.trees,
        };
        pack.add(kind, id, sealed)?;
        if pack.bytes.len() < PACK_SIZE {
            return Ok(());
        }
        let full = std::mem::take(pack);
        self.write(full).await
    }

    async fn write(&mut self, pack: Pack) -> Result<()> {
        while self.writes.len() >= WRITES {
            self.one_written().await?;
        }
        let repository = Arc::clone(&self.repository);
        self.writes.spawn_blocking(move || pack.write(&repository));
        if self.last_index.elapsed() >= INDEX_EVERY {
            self.write_index().await?;
        }
        Ok(())
    }

    async fn one_written(&mut self) -> Result<()> {
        match self.writes.join_next().await {
            Some(Ok(written)) => {
                let (written, mut room) = written?;
                self.written.push(written);
                room.clear();
                if room.capacity() >= PACK_SIZE {
                    self.spare.push(room);
                }
            }
            Some(Err(join)) => return Err(Error::new(ErrorKind::Io, "writing a pack failed").because(join)),
            None => {}
        }
        Ok(())
    }

    async fn write_index(&mut self) -> Result<()> {
        self.last_index = Instant::now();
        let packs = std::mem::take(&mut self.written);
        if packs.is_empty() {
            return Ok(());
        }
        let repository = Arc::clone(&self.repository);
        crate::error::blocking(move || index::write(&repository, packs)).await
    }

    /// Writes what is worth a pack of its own, and waits until it is written: what is left for [`finish`](Self::finish)
    /// is little.
    pub(crate) async fn settle(&mut self) -> Result<()> {
        if self.data.bytes.len() >= LITTLE {
            let data = std::mem::take(&mut self.data);
            self.write(data).await?;
        }
        while !self.writes.is_empty() {
            self.one_written().await?;
        }
        Ok(())
    }

    /// Writes all that was added, and its index. Everything is durable when it returns.
    pub(crate) async fn finish(&mut self) -> Result<()> {
        for pack in [std::mem::take(&mut self.data), std::mem::take(&mut self.trees)] {
            if !pack.blobs.is_empty() {
                self.write(pack).await?;
            }
        }
        while !self.writes.is_empty() {
            self.one_written().await?;
        }
        self.write_index().await
    }

    /// After a failure: what is written already is put into an index, for the next run to find.
    pub(crate) async fn abandon(&mut self) -> Result<()> {
        while !self.writes.is_empty() {
            // One that failed has told its reason already, to somebody else.
            let _ = self.one_written().await;
        }
        self.write_index().await
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let key = crypto::Key::new(&[1; 32], &[2; 16], &[3; 16]).unwrap();
        let blob = |kind, id: &[u8], offset, length, uncompressed| IndexBlob {
            id: Id::of(id),
            kind,
            offset,
            length,
            uncompressed_length: NonZeroU32::new(uncompressed),
        };
        let blobs = [
            blob(BlobKind::Data, b"a", 0, 100, 300),
            blob(BlobKind::Data, b"b", 100, 50, 0),
            blob(BlobKind::Tree, b"c", 150, 60, 70),
        ];
        let mut pack = vec![0; 210];
        let sealed = key.encrypt(&header(&blobs)).unwrap();
        pack.extend(&sealed);
        pack.extend(u32::try_from(sealed.len()).unwrap().to_le_bytes());
        assert_eq!(read_header(&key, &pack).unwrap(), blobs);
        assert_eq!(pack.len() as u64, length(&blobs));
        assert!(read_header(&key, &pack[..pack.len() - 1]).is_err());
        assert!(read_header(&key, &pack[..3]).is_err());
    }
}
