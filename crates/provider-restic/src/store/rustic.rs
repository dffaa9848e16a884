//! Lets rustic read, check, forget and prune through our stores.

use super::{Folder, Store};
use bytes::Bytes;
use rustic_core::{BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend};
use std::{fmt, io, sync::Arc};
use stillpoint_buffer as buffer;

/// The files of a store, as rustic wants them.
#[derive(Clone)]
pub(crate) struct Files(pub Arc<dyn Store>);

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.location())
    }
}

fn folder(kind: FileType) -> Folder {
    match kind {
        FileType::Config => Folder::Config,
        FileType::Index => Folder::Index,
        FileType::Key => Folder::Keys,
        FileType::Snapshot => Folder::Snapshots,
        FileType::Pack => Folder::Data,
    }
}

fn failed(error: io::Error) -> Box<RusticError> {
    RusticError::with_source(ErrorKind::Backend, "access to the repository failed", error)
}

impl ReadBackend for Files {
    fn location(&self) -> String {
        self.0.location()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(Id, u32)>> {
        let found = self.0.list(folder(kind)).map_err(failed)?;
        let entry = |(name, size): (String, u64)| {
            let id = if kind == FileType::Config { Id::default() } else { name.parse().ok()? };
            Some((id, u32::try_from(size).ok()?))
        };
        Ok(found.into_iter().filter_map(entry).collect())
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<Bytes> {
        self.0.read(folder(kind), &id.to_hex()).map_err(failed)
    }

    fn read_partial(
        &self,
        kind: FileType,
        id: &Id,
        _: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        self.0
            .read_part(folder(kind), &id.to_hex(), offset.into(), length.into())
            .map(buffer::freeze)
            .map_err(failed)
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        folder(kind).path(&id.to_hex())
    }
}

impl WriteBackend for Files {
    fn create(&self) -> RusticResult<()> {
        // It was made for the key, which is written first.
        Ok(())
    }

    fn write_bytes(&self, kind: FileType, id: &Id, _: bool, content: BytesList) -> RusticResult<()> {
        self.0.write(folder(kind), &id.to_hex(), content.slice()).map_err(failed)?;
        // rustic relies on what it wrote when it removes what that replaces.
        if kind == FileType::Pack { Ok(()) } else { self.0.sync().map_err(failed) }
    }

    fn remove(&self, kind: FileType, id: &Id, _: bool) -> RusticResult<()> {
        // An index goes before the packs that it names.
        if kind != FileType::Pack {
            self.0.sync().map_err(failed)?;
        }
        self.0.remove(folder(kind), &id.to_hex()).map_err(failed)?;
        if kind == FileType::Index { self.0.sync().map_err(failed) } else { Ok(()) }
    }
}
