//! Getting a point back: its disks and its configuration, into a directory.
//!
//! # Crash
//! An image is written under a name that ends in `.partial` and gets its own name when it is whole and durable, so
//! that what looks restored is restored.

use crate::{
    cli::{self, Format},
    commands::{resolve, watched},
    config::Config,
    failure::{Exit, Failure, Guest},
    interrupt::Interrupt,
    progress::BytesProgress,
    provider_failure::provider_failure,
    text::{self, print},
};
use std::{path::Path, sync::Arc, time::Instant};
use stillpoint_image::{Directory, ImageWriter};
use stillpoint_model::{DiskName, ExtentKind, Length, Offset, PointId, Range, VmName};
use stillpoint_provider::{Progress as _, Provider, Restore, VolumeSource};
use tokio::task::JoinSet;

/// One read.
const PIECE: Length = Length::new(1 << 20);
/// Pieces on their way at once, so that reading, checking and writing overlap.
const IN_FLIGHT: usize = 8;

/// `restore`.
///
/// # Errors
/// Exit status 1, and nothing half-restored keeps a final name.
pub(crate) async fn run(path: &Path, arguments: &cli::Restore) -> Result<Exit, Failure> {
    let provider = Config::read(path)?.provider(&arguments.place, path)?;
    let restored = from(provider.as_ref(), arguments).await;
    provider.close().await;
    restored
}

async fn from(provider: &dyn Provider, arguments: &cli::Restore) -> Result<Exit, Failure> {
    let (vm, id) = resolve(provider, &arguments.point).await?;
    let failed = |error: stillpoint_provider::Error| provider_failure(&error, Guest::NotConcerned);
    let restore = provider.restore_vm_init(&vm, &id).await.map_err(failed)?;
    let restored = point(restore.as_ref(), &vm, &id, arguments).await;
    restore.cleanup().await;
    restored
}

async fn point(
    restore: &dyn Restore,
    vm: &VmName,
    id: &PointId,
    arguments: &cli::Restore,
) -> Result<Exit, Failure> {
    let record = restore.record();
    let disks: Vec<(DiskName, Length)> = record
        .disks
        .iter()
        .filter(|disk| arguments.disks.is_empty() || arguments.disks.contains(&disk.name))
        .map(|disk| (disk.name.clone(), disk.size))
        .collect();
    if let Some(unknown) = arguments.disks.iter().find(|name| !disks.iter().any(|(disk, _)| disk == *name)) {
        let there: Vec<_> = record.disks.iter().map(|disk| disk.name.as_str()).collect();
        return Err(Failure::usage(format!("the point has no disk {unknown}; it has {}", there.join(", "))));
    }
    let (output, format, extension) = open_output(arguments)?;
    for (name, _) in &disks {
        refuse_existing(&output, &format!("{name}.{extension}"))?;
    }
    let with_config = arguments.disks.is_empty();
    if with_config {
        refuse_existing(&output, "config")?;
    }
    let interrupt = Interrupt::listen()
        .map_err(|error| Failure::because(Exit::Failed, "cannot listen for signals", &error))?;
    let started = Instant::now();
    let progress = Arc::new(BytesProgress::start(watched(), format!("{vm}/{id}")));
    let total: Length = disks.iter().map(|(_, size)| *size).sum();
    progress.total(total);
    let writing = Writing { output: &output, format, extension, interrupt: &interrupt, progress: &progress };
    let written = writing.all(restore, &disks, with_config).await;
    progress.finish();
    written?;
    let elapsed = started.elapsed();
    for (name, size) in &disks {
        print(format!(
            "{}  {}",
            arguments.output.join(format!("{name}.{extension}")).display(),
            text::bytes(*size)
        ));
    }
    print(format!(
        "restored {vm}/{id}: {}, every byte compared with what was recorded",
        text::throughput(total, elapsed)
    ));
    Ok(Exit::Done)
}

fn open_output(
    arguments: &cli::Restore,
) -> Result<(Directory, stillpoint_image::Format, &'static str), Failure> {
    let output = Directory::open_or_create(&arguments.output).map_err(|error| {
        Failure::because(Exit::Failed, "cannot write there", &error)
            .next("name another directory with --output")
    })?;
    Ok(match arguments.format {
        Format::Raw => (output, stillpoint_image::Format::Raw, "raw"),
        Format::Qcow2 => (output, stillpoint_image::Format::Qcow2, "qcow2"),
    })
}

fn refuse_existing(output: &Directory, name: &str) -> Result<(), Failure> {
    let path = output.path().join(name);
    match output.contains(name) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Failure::new(
            Exit::Failed,
            format!("{} is there already; nothing is overwritten", path.display()),
        )
        .next("name an empty directory with --output")),
        Err(error) => Err(Failure::because(Exit::Failed, "cannot look there", &error)),
    }
}

struct Writing<'a> {
    output: &'a Directory,
    format: stillpoint_image::Format,
    extension: &'static str,
    interrupt: &'a Interrupt,
    progress: &'a Arc<BytesProgress>,
}

impl Writing<'_> {
    async fn all(
        &self,
        restore: &dyn Restore,
        disks: &[(DiskName, Length)],
        with_config: bool,
    ) -> Result<(), Failure> {
        let failed = |error: stillpoint_provider::Error| provider_failure(&error, Guest::NotConcerned);
        for (name, _) in disks {
            let source = restore.volume(name).await.map_err(failed)?;
            let written = self.disk(name, source).await;
            restore.volume_cleanup(name).await;
            written?;
        }
        if !with_config {
            return Ok(());
        }
        let files = restore.config().await.map_err(failed)?;
        let write = || -> stillpoint_image::Result<()> {
            let directory = self.output.create_directory("config")?;
            for file in &files {
                directory.write_file(file.name.as_str(), &file.content)?;
            }
            directory.sync()
        };
        write().map_err(|error| write_failure(&error))
    }

    async fn disk(&self, name: &DiskName, source: Arc<dyn VolumeSource>) -> Result<(), Failure> {
        let partial = format!("{name}.{}.partial", self.extension);
        if self.output.contains(&partial).unwrap_or(false) {
            self.output.remove_tree(&partial).map_err(|error| write_failure(&error))?;
        }
        let written = self.image(&partial, source).await;
        if written.is_err() {
            // Half an image is of no use to anybody.
            let _ = self.output.remove_tree(&partial);
        }
        written?;
        let named = self.output.rename(&partial, &format!("{name}.{}", self.extension));
        named.and_then(|()| self.output.sync()).map_err(|error| write_failure(&error))
    }

    async fn image(&self, partial: &str, source: Arc<dyn VolumeSource>) -> Result<(), Failure> {
        let size = source.size();
        let writer = ImageWriter::create(self.output, partial, self.format, size)
            .map_err(|error| write_failure(&error))?;
        let writer = Arc::new(writer);
        let mut pieces = JoinSet::new();
        let mut at = Offset::ZERO;
        while at.get() < size.get() {
            let regions =
                source.regions(at).await.map_err(|error| provider_failure(&error, Guest::NotConcerned))?;
            let Some(last) = regions.last() else {
                return Err(Failure::new(
                    Exit::Failed,
                    format!("the target's map of {partial} ends before the disk does"),
                ));
            };
            at = last.range.end();
            for region in regions {
                if region.kind != ExtentKind::Data {
                    self.progress.advanced(region.range.length());
                    continue;
                }
                for piece in region.range.chunks(PIECE) {
                    if self.interrupt.is_set() {
                        return Err(Failure::new(
                            Exit::Interrupted,
                            "interrupted by a signal; what was not whole is removed",
                        ));
                    }
                    while pieces.len() >= IN_FLIGHT {
                        one_done(&mut pieces).await?;
                    }
                    pieces.spawn(copy(
                        Arc::clone(&source),
                        Arc::clone(&writer),
                        piece,
                        Arc::clone(self.progress),
                    ));
                }
            }
        }
        while !pieces.is_empty() {
            one_done(&mut pieces).await?;
        }
        drop(source);
        let writer = Arc::into_inner(writer)
            .ok_or_else(|| Failure::new(Exit::Failed, "an image is still being written"))?;
        let finished = tokio::task::spawn_blocking(move || writer.finish()).await;
        finished
            .map_err(|error| Failure::because(Exit::Failed, "writing an image", &error))?
            .map_err(|error| write_failure(&error))
    }
}

async fn copy(
    source: Arc<dyn VolumeSource>,
    writer: Arc<ImageWriter>,
    piece: Range,
    progress: Arc<BytesProgress>,
) -> Result<(), Failure> {
    let bytes = source.read(piece).await.map_err(|error| provider_failure(&error, Guest::NotConcerned))?;
    let written = tokio::task::spawn_blocking(move || writer.write(piece.start(), &bytes)).await;
    let written = written.map_err(|error| Failure::because(Exit::Failed, "writing an image", &error))?;
    written.map_err(|error| write_failure(&error))?;
    progress.advanced(piece.length());
    Ok(())
}

async fn one_done(pieces: &mut JoinSet<Result<(), Failure>>) -> Result<(), Failure> {
    match pieces.join_next().await {
        Some(Ok(done)) => done,
        Some(Err(error)) => Err(Failure::because(Exit::Failed, "restoring", &error)),
        None => Ok(()),
    }
}

fn write_failure(error: &stillpoint_image::Error) -> Failure {
    Failure::because(Exit::Failed, "cannot write what is restored", error)
        .next("make room, or name another directory with --output")
}
