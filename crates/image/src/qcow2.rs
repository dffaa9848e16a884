//! Writing qcow2 images, alone or as an overlay.

use crate::{
    Backing, Directory, Error, ErrorKind, Format, Result, block_on::block_on, writeback::Writeback, zero,
};
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, file::File as ImagoFile,
    qcow2::Qcow2,
};
use std::{
    fs::File,
    io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};
use stillpoint_model::{Granularity, Length, Offset, Range};

/// QEMU cuts a qcow2 image's size down to whole sectors, while it rounds a raw file's length up. An image of an odd
/// size is therefore made a part of a sector longer, and the true size is kept by whoever keeps the image.
const SECTOR: u64 = 512;

/// Most entries of the L1 table, which is held in memory: 1 MiB of them, where QEMU would take 32 MiB.
const L1_ENTRIES: u64 = 1 << 17;

/// Writes a qcow2 image. Clusters that are never touched read from the backing image, or as zeroes without one.
#[must_use = "an image is only durable once it is finished"]
#[derive(Debug)]
pub struct Qcow2Writer {
    /// One call at a time: metadata has to be written in order anyway, and clusters then lie in the file in the order
    /// in which they came. `None` once the image is given up.
    image: Mutex<Option<FormatAccess<ImagoFile>>>,
    file: File,
    path: PathBuf,
    size: Length,
    virtual_size: u64,
    cluster: u64,
    overlay: bool,
    writeback: Writeback,
    finished: bool,
}

impl Qcow2Writer {
    /// The smallest cluster, from 4 KiB to 64 KiB, that is no smaller than what changes at once and keeps the L1 table
    /// of a disk of `size` bytes small.
    pub fn cluster_for(size: Length, changes: Option<Granularity>) -> Granularity {
        let wanted = changes.map_or(64 << 10, |granularity| u64::from(granularity).clamp(4 << 10, 64 << 10));
        // An L2 table is one cluster of 8-byte entries.
        let fits = |cluster: u64| size.get() / (cluster * cluster / 8) < L1_ENTRIES;
        let cluster = [4u64 << 10, 8 << 10, 16 << 10, 32 << 10]
            .into_iter()
            .find(|&cluster| cluster >= wanted && fits(cluster))
            .unwrap_or(64 << 10);
        Granularity::try_from(cluster).unwrap_or(Granularity::DEFAULT)
    }

    /// Creates `name`, which must not be there, for a disk of `size` bytes; `cluster` of `None` means 64 KiB. The
    /// backing image is named in the header and not opened.
    ///
    /// # Errors
    /// If it is there, or cannot be made.
    pub fn create(
        directory: &Directory,
        name: &str,
        size: Length,
        cluster: Option<Granularity>,
        backing: Option<&Backing>,
    ) -> Result<Self> {
        let path = directory.path().join(name);
        let cluster = u64::from(cluster.unwrap_or(Granularity::DEFAULT)).min(2 << 20);
        let virtual_size = size.get().checked_next_multiple_of(SECTOR).ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("a disk of {size} bytes is too large for {}", path.display()))
        })?;
        let file = directory.create_file(name)?;
        let cannot = |source| Error::at("create", &path, source);
        let storage = file.try_clone().and_then(ImagoFile::try_from).map_err(cannot)?;
        let mut builder = Qcow2::<ImagoFile>::create_builder(storage)
            .size(virtual_size)
            .cluster_size(usize::try_from(cluster).unwrap_or(64 << 10));
        if let Some(Backing { file, format }) = backing {
            builder = builder.backing(file.clone(), format.as_str().to_owned());
        }
        let open = |storage| Ok(Qcow2::builder(storage).write(true).backing(None));
        let image = quietly(|| block_on(builder.create_open(DenyImplicitOpenGate::default(), open)));
        let image = image.map_err(cannot)?;
        Ok(Self {
            image: Mutex::new(Some(FormatAccess::new(image))),
            file,
            path,
            size,
            virtual_size,
            cluster,
            overlay: backing.is_some(),
            writeback: Writeback::default(),
            finished: false,
        })
    }

    /// Does `work` with the image, while nobody else does.
    fn with_image(&self, work: impl FnOnce(&FormatAccess<ImagoFile>) -> io::Result<()>) -> io::Result<()> {
        match &*self.image.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(image) => work(image),
            None => Err(io::Error::other("the image was given up")),
        }
    }

    /// A cluster of an overlay is written whole: the rest of one that is written in part would have to come from the
    /// backing image, which is not opened here.
    fn check(&self, at: Offset, length: Length) -> Result<Range> {
        let range = Range::new(at, length).ok().filter(|range| range.end().get() <= self.size.get());
        let whole = |range: &Range| {
            range.start().get().is_multiple_of(self.cluster)
                && (range.end().get().is_multiple_of(self.cluster) || range.end().get() == self.size.get())
        };
        match range {
            Some(range) if !self.overlay || whole(&range) => Ok(range),
            _ => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "{length} bytes at {at} are not whole clusters of {} bytes within {} of {} bytes",
                    self.cluster,
                    self.path.display(),
                    self.size
                ),
            )),
        }
    }

    /// Writes `bytes` at `at`; clusters of zeroes become zero clusters, which hide the backing image. In an overlay
    /// only whole clusters can be written (the last one may be cut by the end of the disk).
    ///
    /// # Errors
    /// If they are not whole clusters, end past the disk, or cannot be written.
    pub fn write(&self, at: Offset, bytes: &[u8]) -> Result<()> {
        let range = self.check(at, Length::new(bytes.len() as u64))?;
        let mut zero_from = range.start().get();
        for part in zero::data_parts(at.get(), bytes, self.cluster) {
            let (start, end) = (at.get() + part.start as u64, at.get() + part.end as u64);
            self.zero_between(zero_from, start)?;
            let data = bytes.get(part).unwrap_or_default();
            self.with_image(|image| block_on(image.write(data, start)))
                .map_err(|source| Error::at("write", &self.path, source))?;
            self.writeback.wrote(&self.file, data.len());
            zero_from = end;
        }
        self.zero_between(zero_from, range.end().get())
    }

    fn zero_between(&self, start: u64, end: u64) -> Result<()> {
        // What is past the true size belongs to the last cluster.
        let end = if end == self.size.get() { self.virtual_size } else { end };
        if start >= end {
            return Ok(());
        }
        self.with_image(|image| block_on(image.write_zeroes(start, end - start)))
            .map_err(|source| Error::at("write zeroes to", &self.path, source))
    }

    /// Makes `range` read as zeroes; in an overlay it must be whole clusters.
    ///
    /// # Errors
    /// If it is not whole clusters, ends past the disk, or cannot be written.
    pub fn zero(&self, range: Range) -> Result<()> {
        let range = self.check(range.start(), range.length())?;
        if range.is_empty() { Ok(()) } else { self.zero_between(range.start().get(), range.end().get()) }
    }

    /// Writes the metadata that is still held and makes the file durable, not its name: that takes a
    /// [`Directory::sync`]. Returns the file's length.
    ///
    /// # Errors
    /// If that fails; the image must then not be used.
    pub fn finish(mut self) -> Result<Length> {
        let path = self.path.clone();
        let cannot = |source| Error::at("make durable", &path, source);
        self.with_image(|image| block_on(image.flush())).map_err(cannot)?;
        self.file.sync_all().map_err(cannot)?;
        let length = self.file.metadata().map_err(cannot)?.len();
        self.finished = true;
        Ok(Length::new(length))
    }

    /// What it writes.
    pub const FORMAT: Format = Format::Qcow2;
}

/// imago logs an error for each table that it drops unwritten. That is the lot of an image that was given up, whose error its
/// caller already has; after a successful [`finish`](Qcow2Writer::finish) there is none, and whatever it logs then is worth reading.
impl Drop for Qcow2Writer {
    fn drop(&mut self) {
        let image = self.image.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if self.finished { drop(image) } else { quietly(|| drop(image)) }
    }
}

/// Does `work` with nobody listening to what it logs on this thread.
fn quietly<T>(work: impl FnOnce() -> T) -> T {
    tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::default(), work)
}

#[cfg(test)]
mod test {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts what is logged.
    struct Counting(std::sync::Arc<AtomicUsize>);

    impl tracing::Subscriber for Counting {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            if *event.metadata().level() == tracing::Level::ERROR {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn an_image_that_is_given_up_logs_no_error() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = Directory::open(scratch.path()).unwrap();
        let errors = std::sync::Arc::<AtomicUsize>::default();
        tracing::subscriber::with_default(Counting(std::sync::Arc::clone(&errors)), || {
            let writer =
                Qcow2Writer::create(&directory, "given-up.qcow2", Length::new(1 << 20), None, None).unwrap();
            writer.write(Offset::ZERO, &[7; 65_536]).unwrap();
            drop(writer);
            let writer =
                Qcow2Writer::create(&directory, "whole.qcow2", Length::new(1 << 20), None, None).unwrap();
            writer.write(Offset::ZERO, &[7; 65_536]).unwrap();
            writer.finish().unwrap();
            tracing::error!("this one is heard");
        });
        assert_eq!(errors.load(Ordering::Relaxed), 1);
    }
}
