//! The repository's index: which blobs it holds, and in which pack each is.

use crate::{
    blob::{BlobKind, Id},
    crypto,
    error::{damaged, stored},
    repository::Repository,
    store::Folder,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use stillpoint_provider::Result;

/// Most bytes of an index file once it is unpacked; those that programs write have some megabytes.
const LARGEST: u64 = 1 << 30;
/// Index files read at once: on object stores each is a round trip. Each is some 20 MB of memory.
const READERS: usize = 2;

/// An index file, as restic's design document has it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct IndexFile {
    pub packs: Vec<IndexPack>,
}

/// A pack and what it holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct IndexPack {
    pub id: Id,
    pub blobs: Vec<IndexBlob>,
}

/// A blob in a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IndexBlob {
    pub id: Id,
    #[serde(rename = "type")]
    pub kind: BlobKind,
    pub offset: u32,
    pub length: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncompressed_length: Option<NonZeroU32>,
}

/// Where a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    pub pack: Id,
    pub offset: u32,
    pub length: u32,
    pub uncompressed: Option<NonZeroU32>,
}

impl IndexPack {
    fn location(&self, blob: &IndexBlob) -> Location {
        Location {
            pack: self.id,
            offset: blob.offset,
            length: blob.length,
            uncompressed: blob.uncompressed_length,
        }
    }
}

/// Reads every index file and hands each pack to `each`, from several threads.
pub(crate) fn read_all(repository: &Repository, each: impl Fn(IndexPack) + Sync) -> Result<()> {
    let files =
        repository.store.list(Folder::Index).map_err(|error| stored("cannot list the index", error))?;
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        while let Some((name, _)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            match read(repository, name) {
                Ok(file) => file.packs.into_iter().for_each(&each),
                Err(error) => {
                    next.store(files.len(), Ordering::Relaxed);
                    if let Ok(mut failed) = failed.lock() {
                        failed.get_or_insert(error);
                    }
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..READERS.min(files.len()) {
            scope.spawn(work);
        }
        work();
    });
    match failed.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => Ok(()),
    }
}

/// One index file.
pub(crate) fn read(repository: &Repository, name: &str) -> Result<IndexFile> {
    let json = repository.read_file(Folder::Index, name, LARGEST)?;
    serde_json::from_slice(&json).map_err(|error| damaged(format!("index {name} is none")).because(error))
}

/// Writes an index of `packs`, all of which are in the store.
pub(crate) fn write(repository: &Repository, packs: Vec<IndexPack>) -> Result<()> {
    let failed = |error| stored("cannot write the index", error);
    let json = serde_json::to_vec(&IndexFile { packs })
        .map_err(|error| damaged("the index cannot be written").because(error))?;
    let sealed = crypto::seal_file(&repository.key, repository.compress, &json)?;
    let name = Id::of(&sealed).to_string();
    // What it names has to last longer than it does.
    repository.store.sync().map_err(failed)?;
    stillpoint_failpoint::reached("restic-index");
    repository.store.write(Folder::Index, &name, &[Bytes::from(sealed)]).map_err(failed)?;
    repository.store.sync().map_err(failed)
}

/// Where the blobs of `wanted` are. Those that are not there are left out.
pub(crate) fn locate(
    repository: &Repository,
    kind: BlobKind,
    wanted: &HashSet<Id>,
) -> Result<HashMap<Id, Location>> {
    let found = Mutex::new(HashMap::new());
    read_all(repository, |pack| {
        for blob in &pack.blobs {
            if blob.kind == kind
                && wanted.contains(&blob.id)
                && let Ok(mut found) = found.lock()
            {
                found.insert(blob.id, pack.location(blob));
            }
        }
    })?;
    found.into_inner().map_err(|_| damaged("reading the index failed"))
}

/// Where all trees are: there are a few in a snapshot.
pub(crate) fn trees(repository: &Repository) -> Result<HashMap<Id, Location>> {
    let found = Mutex::new(HashMap::new());
    read_all(repository, |pack| {
        for blob in pack.blobs.iter().filter(|blob| blob.kind == BlobKind::Tree) {
            if let Ok(mut found) = found.lock() {
                found.insert(blob.id, pack.location(blob));
            }
        }
    })?;
    found.into_inner().map_err(|_| damaged("reading the index failed"))
}

/// The data blobs that a repository holds, in 16 bytes each: the first half of its id. That two of them agree in 128
/// bits of SHA-256 is not going to happen (ADR 0016).
pub(crate) struct Known {
    /// Those of the index, sorted. One vector, which grows in place: a thousand that grew beside each other left holes of
    /// half their size.
    indexed: Vec<u128>,
    /// Those that this run has taken on itself to store.
    claimed: HashSet<u128>,
}

/// What an index tells before a backup.
pub(crate) struct Index {
    pub known: Known,
    /// Where all trees are.
    pub trees: HashMap<Id, Location>,
}

fn short(id: &Id) -> u128 {
    let (half, _) = id.bytes().split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
    u128::from_be_bytes(*half)
}

impl Index {
    /// Reads it.
    pub(crate) fn load(repository: &Repository) -> Result<Self> {
        let (data, trees) = (Mutex::new(Vec::new()), Mutex::new(HashMap::new()));
        read_all(repository, |pack| {
            if let Ok(mut data) = data.lock() {
                let blobs = pack.blobs.iter().filter(|blob| blob.kind == BlobKind::Data);
                data.extend(blobs.map(|blob| short(&blob.id)));
            }
            for blob in pack.blobs.iter().filter(|blob| blob.kind == BlobKind::Tree) {
                if let Ok(mut trees) = trees.lock() {
                    trees.insert(blob.id, pack.location(blob));
                }
            }
        })?;
        let mut indexed = data.into_inner().map_err(|_| damaged("reading the index failed"))?;
        indexed.sort_unstable();
        let trees = trees.into_inner().map_err(|_| damaged("reading the index failed"))?;
        Ok(Self { known: Known { indexed, claimed: HashSet::new() }, trees })
    }
}

impl Known {
    /// Whether the index has it.
    pub(crate) fn is_indexed(&self, id: &Id) -> bool {
        self.indexed.binary_search(&short(id)).is_ok()
    }

    /// Whether it is for the caller to store: it is nowhere, and nobody else was told so in this run.
    pub(crate) fn claim(&mut self, id: &Id) -> bool {
        !self.is_indexed(id) && self.claimed.insert(short(id))
    }

    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Self { indexed: Vec::new(), claimed: HashSet::new() }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_blob_is_stored_once() {
        let mut known = Known::empty();
        let (one, other) = (Id::of(b"1"), Id::of(b"2"));
        known.indexed.push(short(&one));
        assert!(known.is_indexed(&one) && !known.claim(&one));
        assert!(!known.is_indexed(&other) && known.claim(&other) && !known.claim(&other));
    }
}
