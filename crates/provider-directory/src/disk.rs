//! Takes one disk: several reads under way, hashing beside them, and one thread that writes in order.
//!
//! ```text
//!   regions -> plan -> read, release, hash   (16 at once; a full image is written here too, each part in its place)
//!                          |  in order
//!                          v
//!                        sink: overlay clusters, records
//! ```
//!
//! At most [`IN_FLIGHT`] parts of 1 MiB are read and [`QUEUED`] wait to be written, whatever the disk's size.
//!
//! # Cancellation
//! Dropping the future stops the reads at once. Blocking work that is under way ends by itself, in files that nobody
//! lists; the caller removes them after that (see [`crate::backup`]).

use crate::{
    chain::Chain,
    cover::tables_sum,
    error::{blocking, from_image, stored},
    layout,
    manifest::{Base, StoredDisk},
    plan::{Fill, Job, Planner},
    sums::{Record, Sum, SumsWriter, sum},
};
use bytes::Bytes;
use std::{collections::VecDeque, sync::Arc};
use stillpoint_image::{self as image, Backing, Directory, Format, Layer, Qcow2Writer, RawWriter};
use stillpoint_model::{DiskName, Extent, Granularity, Length, Offset, Range};
use stillpoint_provider::{Error, ErrorKind, Result, VolumeSource};
use tokio::{sync::mpsc, task::JoinHandle};

/// Parts that are read, hashed and written at once: enough that storage which is slow for a moment stops nobody.
const IN_FLIGHT: usize = 16;
/// Parts that wait for the thread that writes in order.
const QUEUED: usize = 4;

/// What an overlay is made on.
pub(crate) struct Below {
    pub(crate) chain: Chain,
    pub(crate) base: Base,
    pub(crate) cluster: Granularity,
}

/// One disk to take.
pub(crate) struct DiskTask {
    pub(crate) name: DiskName,
    pub(crate) source: Arc<dyn VolumeSource>,
    pub(crate) directory: Arc<Directory>,
    /// `None` for a full image.
    pub(crate) below: Option<Arc<Below>>,
}

/// What is read and hashed, on its way to the sink.
enum Item {
    /// A part with data; its bytes only where they are not written yet.
    Data(Range, Sum, Option<Bytes>),
    /// Zeroes: a hole in a full image, zero clusters in an overlay.
    Zero(Range),
    /// Everything has come. Without it, what came is not a disk.
    End,
}

enum Writer {
    Raw(Arc<RawWriter>),
    Overlay(Qcow2Writer),
}

/// Ends the task with whoever waits for it.
struct Task<T>(JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn source_error(name: &DiskName, what: &str) -> Error {
    Error::new(ErrorKind::Source, format!("disk {name}: {what}"))
}

/// Stores a disk's image and sums, durable but for their names.
pub(crate) async fn store(task: DiskTask) -> Result<StoredDisk> {
    let task = Arc::new(task);
    let (sink, raw) = blocking({
        let task = Arc::clone(&task);
        move || Sink::create(task)
    })
    .await?;
    let (items, received) = mpsc::channel(QUEUED);
    let sink = tokio::spawn(blocking(move || sink.run(received)));
    let fed = feed(&task, raw, &items).await;
    drop(items);
    let stored_disk =
        sink.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Cancelled, "the run is ending")));
    // If the sink failed, feeding ended early and without an error of its own.
    fed.and(stored_disk)
}

async fn feed(task: &Arc<DiskTask>, raw: Option<Arc<RawWriter>>, items: &mpsc::Sender<Item>) -> Result<()> {
    let size = task.source.size();
    let mut planner = Planner::new(size, task.below.as_ref().map(|below| below.cluster));
    let mut at = Offset::ZERO;
    let mut reading: VecDeque<Task<Result<Option<Item>>>> = VecDeque::with_capacity(IN_FLIGHT);
    let mut mapped = false;
    loop {
        while reading.len() < IN_FLIGHT {
            if let Some(job) = planner.next() {
                reading.push_back(Task(tokio::spawn(take(Arc::clone(task), raw.clone(), job))));
            } else if mapped {
                break;
            } else if at.get() < size.get() {
                at = map(task, at, &mut planner).await?;
            } else {
                planner.finish();
                mapped = true;
            }
        }
        let Some(mut oldest) = reading.pop_front() else { break };
        let item =
            (&mut oldest.0).await.map_err(|_| Error::new(ErrorKind::Cancelled, "the run is ending"))??;
        if let Some(item) = item
            && items.send(item).await.is_err()
        {
            return Ok(());
        }
    }
    let _the_sink_tells_itself_if_it_failed = items.send(Item::End).await;
    Ok(())
}

/// Gets regions from `from` on into the plan; where to go on. A map that does not add up is an error, never an end (I7).
async fn map(task: &DiskTask, from: Offset, planner: &mut Planner) -> Result<Offset> {
    let extents = task.source.regions(from).await?;
    let mut at = from;
    for Extent { range, kind } in extents {
        if range.start() != at || range.is_empty() || range.end().get() > task.source.size().get() {
            return Err(source_error(&task.name, &format!("its map has a gap or an overlap at {at}")));
        }
        at = range.end();
        if !planner.push(Extent { range, kind }) {
            return Err(source_error(
                &task.name,
                &format!("its map has a clean region at {range} in a full read"),
            ));
        }
    }
    if at == from {
        return Err(source_error(&task.name, &format!("its map ends at {at}, before the disk does")));
    }
    Ok(at)
}

/// Does one job up to what has to be done in order.
async fn take(task: Arc<DiskTask>, raw: Option<Arc<RawWriter>>, job: Job) -> Result<Option<Item>> {
    match job {
        Job::Skip(range) => {
            release(&task, range).await;
            Ok(None)
        }
        Job::Zero(range) => {
            release(&task, range).await;
            Ok(Some(Item::Zero(range)))
        }
        Job::Part { part, pieces, done } => {
            let mut read = Vec::with_capacity(pieces.len());
            for (range, fill) in pieces {
                let bytes = match fill {
                    Fill::Read => Some(read_exactly(&task, range).await?),
                    Fill::Zero | Fill::Base => None,
                };
                read.push((range, fill, bytes));
            }
            let of = Arc::clone(&task);
            let stored = blocking(move || {
                let bytes = compose(&of, part, read)?;
                if image::is_zero(&bytes) {
                    return Ok(Some(Item::Zero(part)));
                }
                let sum = sum(&bytes);
                match raw {
                    Some(raw) => {
                        raw.write(part.start(), &bytes).map_err(from_image)?;
                        Ok(Some(Item::Data(part, sum, None)))
                    }
                    None => Ok(Some(Item::Data(part, sum, Some(bytes)))),
                }
            });
            // It is read: what was kept aside of it can go while it is stored.
            let ((), stored) = tokio::join!(release(&task, done), stored);
            stored
        }
    }
}

async fn read_exactly(task: &DiskTask, range: Range) -> Result<Bytes> {
    let bytes = task.source.read(range).await?;
    if bytes.len() as u64 == range.length().get() {
        Ok(bytes)
    } else {
        Err(source_error(&task.name, &format!("reading {range} gave {} bytes", bytes.len())))
    }
}

/// What was read stays good if the other side refuses; only old data is kept longer than it has to be.
async fn release(task: &DiskTask, range: Range) {
    if let Err(error) = task.source.release(range).await {
        tracing::debug!(disk = %task.name, %range, %error, "could not give a part back");
    }
}

/// Puts a part together; the common case of a single read is passed on as it is.
fn compose(task: &DiskTask, part: Range, mut pieces: Vec<(Range, Fill, Option<Bytes>)>) -> Result<Bytes> {
    if let [(range, _, bytes)] = pieces.as_mut_slice()
        && *range == part
        && let Some(bytes) = bytes.take()
    {
        return Ok(bytes);
    }
    let mut whole = Vec::with_capacity(usize::try_from(part.length().get()).unwrap_or_default());
    for (range, fill, bytes) in pieces {
        let length = usize::try_from(range.length().get()).unwrap_or_default();
        match (fill, bytes, &task.below) {
            (_, Some(bytes), _) => whole.extend_from_slice(&bytes),
            (Fill::Base, None, Some(below)) => {
                let start = whole.len();
                whole.resize(start + length, 0);
                below.chain.read(range.start(), whole.get_mut(start..).unwrap_or_default())?;
            }
            _ => whole.resize(whole.len() + length, 0),
        }
    }
    Ok(whole.into())
}

/// Writes what has to be written in order.
struct Sink {
    task: Arc<DiskTask>,
    format: Format,
    size: Length,
    writer: Writer,
    sums: SumsWriter,
    stored: Length,
}

impl Sink {
    fn create(task: Arc<DiskTask>) -> Result<(Self, Option<Arc<RawWriter>>)> {
        let size = task.source.size();
        let format = if task.below.is_some() { Format::Qcow2 } else { Format::Raw };
        let name = layout::image(&task.name, format);
        let (writer, raw) = match &task.below {
            None => {
                let raw = Arc::new(RawWriter::create(&task.directory, &name, size).map_err(from_image)?);
                (Writer::Raw(Arc::clone(&raw)), Some(raw))
            }
            Some(below) => {
                let base = &below.base;
                let format = if base.image.ends_with(".raw") { Format::Raw } else { Format::Qcow2 };
                let backing = Backing { file: layout::from_sibling(&base.point, &base.image), format };
                let overlay =
                    Qcow2Writer::create(&task.directory, &name, size, Some(below.cluster), Some(&backing));
                (Writer::Overlay(overlay.map_err(from_image)?), None)
            }
        };
        let sums = SumsWriter::create(&task.directory, &layout::sums(&task.name), size)?;
        Ok((Self { task, format, size, writer, sums, stored: Length::ZERO }, raw))
    }

    fn run(mut self, mut items: mpsc::Receiver<Item>) -> Result<StoredDisk> {
        loop {
            match items.blocking_recv() {
                Some(Item::Data(range, sum, bytes)) => {
                    if let (Writer::Overlay(overlay), Some(bytes)) = (&self.writer, bytes) {
                        overlay.write(range.start(), &bytes).map_err(from_image)?;
                    }
                    self.stored = self.stored.saturating_add(range.length());
                    self.sums.push(Record { range, sum: Some(sum) })?;
                }
                Some(Item::Zero(range)) => {
                    if let Writer::Overlay(overlay) = &self.writer {
                        overlay.zero(range).map_err(from_image)?;
                        self.sums.push(Record { range, sum: None })?;
                    }
                }
                Some(Item::End) => return self.finish(),
                None => return Err(Error::new(ErrorKind::Cancelled, "the disk was not read to its end")),
            }
        }
    }

    fn finish(self) -> Result<StoredDisk> {
        let Self { task, format, size, writer, sums, stored: data } = self;
        let name = layout::image(&task.name, format);
        let (image_length, tables_blake3, data) = match writer {
            Writer::Raw(raw) => {
                raw.sync().map_err(from_image)?;
                (size, None, data)
            }
            Writer::Overlay(overlay) => {
                let length = overlay.finish().map_err(from_image)?;
                let layer = Layer::open(&task.directory, &name, format, size).map_err(stored)?;
                (length, Some(tables_sum(&layer)?), length)
            }
        };
        let (sums_length, sums_blake3) = sums.finish()?;
        Ok(StoredDisk {
            image: name,
            format,
            size,
            image_length,
            tables_blake3,
            sums: layout::sums(&task.name),
            sums_length,
            sums_blake3,
            stored: data.saturating_add(sums_length),
            base: task.below.as_ref().map(|below| below.base.clone()),
            name: task.name.clone(),
        })
    }
}
