//! Points that a program gives back: by a path, or by an NBD export.

use crate::{
    protocol::{self, RestoreVolumeAnswer},
    provider::Session,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, FileTypeExt as _},
    sync::Arc,
};
use stillpoint_model::{DiskName, Extent, ExtentKind, Length, Offset, PointId, Range, VmName};
use stillpoint_nbd::{Client, MetaContext, Options};
use stillpoint_provider::{ConfigFile, Error, ErrorKind, PointRecord, Restore, Result, VolumeSource};

pub(crate) struct ProgramRestore {
    session: Arc<Session>,
    record: PointRecord,
}

impl ProgramRestore {
    pub(crate) async fn open(session: Arc<Session>, vm: &VmName, point: &PointId) -> Result<Self> {
        let init = protocol::RestoreInit { vm: vm.clone(), point: point.clone() };
        let answer = session.peer.call(&init, session.settings.deadlines.commit).await?;
        if answer.record.id != *point || answer.record.vm != *vm {
            let what = format!("{} opens another point than {vm}/{point}", session.name);
            return Err(Error::new(ErrorKind::Damaged, what));
        }
        Ok(Self { session, record: answer.record })
    }
}

#[async_trait]
impl Restore for ProgramRestore {
    fn record(&self) -> &PointRecord {
        &self.record
    }

    async fn config(&self) -> Result<Vec<ConfigFile>> {
        let answer = self
            .session
            .peer
            .call(&protocol::RestoreConfig {}, self.session.settings.deadlines.commit)
            .await?;
        let file = |file: protocol::WireConfigFile| {
            let name = file.name.clone();
            ConfigFile::try_from(file).map_err(|error| {
                Error::new(ErrorKind::Damaged, format!("configuration file {name}")).because(error)
            })
        };
        answer.files.into_iter().map(file).collect()
    }

    async fn volume(&self, disk: &DiskName) -> Result<Arc<dyn VolumeSource>> {
        let recorded = self.record.disks.iter().find(|recorded| recorded.name == *disk);
        let missing = || Error::new(ErrorKind::NotFound, format!("the point has no disk {disk}"));
        let size = recorded.ok_or_else(missing)?.size;
        let init = protocol::RestoreVolumeInit { name: disk.clone() };
        let answer = self.session.peer.call(&init, self.session.settings.deadlines.commit).await?;
        let source: Arc<dyn VolumeSource> = match answer {
            RestoreVolumeAnswer::Path(path) => {
                let opened = FileVolume::open(&path, size);
                let failed = |error: io::Error| {
                    let what = format!("disk {disk} at {}", path.display());
                    Error::new(ErrorKind::Damaged, what).because(error)
                };
                Arc::new(opened.map_err(failed)?)
            }
            RestoreVolumeAnswer::Nbd { socket, export } => {
                let failed = |error: stillpoint_nbd::Error| {
                    Error::new(ErrorKind::Damaged, format!("disk {disk}")).because(error)
                };
                let options = Options::new(&export).context(MetaContext::base_allocation());
                let client = Client::connect_unix(&socket, options).await.map_err(failed)?;
                if client.size() != size {
                    let what = format!("disk {disk} has {size} bytes, its export {}", client.size());
                    return Err(Error::new(ErrorKind::Damaged, what));
                }
                Arc::new(NbdVolume(client))
            }
        };
        Ok(Arc::new(Given { source, _session: Arc::clone(&self.session) }))
    }

    async fn volume_cleanup(&self, disk: &DiskName) {
        let cleanup = protocol::RestoreVolumeCleanup { name: disk.clone() };
        self.told(self.session.peer.call(&cleanup, self.session.settings.deadlines.answer).await);
    }

    async fn cleanup(&self) {
        let cleanup = protocol::RestoreCleanup {};
        self.told(self.session.peer.call(&cleanup, self.session.settings.deadlines.answer).await);
    }
}

impl ProgramRestore {
    fn told(&self, cleaned: Result<protocol::Done>) {
        if let Err(error) = cleaned {
            tracing::warn!(
                error = crate::rpc::chain(&error),
                provider = self.session.name,
                "did not clean up"
            );
        }
    }
}

/// Keeps the program there for as long as one of its disks is read.
struct Given {
    source: Arc<dyn VolumeSource>,
    _session: Arc<Session>,
}

#[async_trait]
impl VolumeSource for Given {
    fn size(&self) -> Length {
        self.source.size()
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        self.source.regions(from).await
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        self.source.read(range).await
    }

    async fn release(&self, range: Range) -> Result<()> {
        self.source.release(range).await
    }
}

/// A raw image, or a device.
struct FileVolume {
    file: Arc<File>,
    size: Length,
}

impl FileVolume {
    fn open(path: &std::path::Path, size: Length) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?;
        if !kind.is_file() && !kind.file_type().is_block_device() {
            return Err(io::Error::other("it is neither a file nor a block device"));
        }
        let mut file = File::open(path)?;
        let found = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        if found != size.get() {
            return Err(io::Error::other(format!("it has {found} bytes instead of {size}")));
        }
        Ok(Self { file: Arc::new(file), size })
    }
}

#[async_trait]
impl VolumeSource for FileVolume {
    fn size(&self) -> Length {
        self.size
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        use rustix::fs::{SeekFrom, seek};
        let (start, end) = (from.get(), self.size.get());
        // Where there are no holes to be told, all is data.
        let data = match seek(&*self.file, SeekFrom::Data(start)) {
            Ok(data) => data.min(end),
            Err(rustix::io::Errno::NXIO) => end,
            Err(_) => start,
        };
        let (kind, until) = if data > start {
            (ExtentKind::Zero, data)
        } else {
            (
                ExtentKind::Data,
                seek(&*self.file, SeekFrom::Hole(start)).map_or(end, |hole| hole.clamp(start + 1, end)),
            )
        };
        let range = Range::new(from, Length::new(until.saturating_sub(start)));
        let wrong = |error| Error::new(ErrorKind::Damaged, "the map of an image").because(error);
        Ok(vec![Extent { range: range.map_err(wrong)?, kind }])
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        let file = Arc::clone(&self.file);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; usize::try_from(range.length().get()).unwrap_or(usize::MAX)];
            file.read_exact_at(&mut bytes, range.start().get()).map(|()| Bytes::from(bytes))
        });
        let failed = |error: io::Error| {
            Error::new(ErrorKind::Damaged, format!("read what the provider gave at {}", range.start()))
                .because(error)
        };
        read.await.map_err(|error| failed(io::Error::other(error)))?.map_err(failed)
    }

    async fn release(&self, _range: Range) -> Result<()> {
        Ok(())
    }
}

/// An NBD export of the program's.
struct NbdVolume(Client);

#[async_trait]
impl VolumeSource for NbdVolume {
    fn size(&self) -> Length {
        self.0.size()
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let context = MetaContext::base_allocation();
        let left = Length::new(self.0.size().get().saturating_sub(from.get()));
        let all = |kind| Range::new(from, left).map(|range| vec![Extent { range, kind }]);
        let wrong = |error| Error::new(ErrorKind::Damaged, "the map of an export").because(error);
        match self.0.map(&context, from, left).await {
            Ok(map) => Ok(map
                .iter()
                .map(|extent| Extent {
                    range: extent.range,
                    kind: if extent.is_zero(&context) { ExtentKind::Zero } else { ExtentKind::Data },
                })
                .collect()),
            // A server without maps has all of it to be read.
            Err(error) if error.kind() == stillpoint_nbd::ErrorKind::MissingContext => all(ExtentKind::Data)
                .map_err(|error| Error::new(ErrorKind::Damaged, "a range").because(error)),
            Err(error) => Err(wrong(error)),
        }
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        let failed = |error: stillpoint_nbd::Error| {
            Error::new(ErrorKind::Damaged, format!("read the provider's export at {}", range.start()))
                .because(error)
        };
        self.0.read(range).await.map_err(failed)
    }

    async fn release(&self, _range: Range) -> Result<()> {
        Ok(())
    }
}
