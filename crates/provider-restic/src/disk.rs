//! Storing one disk: read, hash, and store what is new.
//!
//! Chunks are read several at a time and worked on by as many threads as there are cores; what comes out is put into
//! packs in order. A clean chunk is taken from the parent's list of chunks and not looked at, a zero one has a known
//! id.

use crate::{
    blob::{BlobKind, Id},
    crypto::{self, Key, SealedBlob},
    error::blocking,
    index::Known,
    pack::Saver,
};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt as _};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};
use stillpoint_model::{Extent, ExtentKind, Granularity, Length, Offset, Range};
use stillpoint_provider::{Error, ErrorKind, Result, VolumeSource};
use tokio::sync::Semaphore;

/// Bytes of chunks that are read or worked on at once.
const IN_FLIGHT: u64 = 24 << 20;
/// Most bytes of one read, as the contract says.
const MOST: Length = Length::new(32 << 20);

/// Chunks that are ready to be worked on while each core has one: a core that waited for the next one to be handed over
/// was idle for a sixth of its time. More than this only get in each other's way.
const READY: usize = 2;

/// A region that is not read is given back as soon as it is known if it has this length: what the guest overwrites there
/// need not be kept aside. A shorter one waits for its turn, to become one with what is read around it: a disk has
/// thousands of them, and each given back by itself costs QEMU as much as a read.
const LARGE: Length = Length::new(8 << 20);

/// What all disks of a run share.
pub(crate) struct Workshop {
    key: Key,
    compress: bool,
    known: Mutex<Known>,
    /// A permit a core, and [`READY`] more.
    threads: Semaphore,
}

impl Workshop {
    pub(crate) fn new(key: Key, compress: bool, known: Known) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let threads = Semaphore::new(cores.saturating_add(READY));
        Self { key, compress, known: Mutex::new(known), threads }
    }

    /// The id of `content`, and the sealed blob if it is for us to store.
    pub(crate) fn work(&self, content: &[u8]) -> Result<(Id, Option<SealedBlob>)> {
        let id = Id::of(content);
        Ok((id, self.seal_if_new(&id, content)?))
    }

    /// The same for a directory. Those are told apart by their points' times, so there is no use in looking for it.
    pub(crate) fn seal_tree(&self, content: &[u8]) -> Result<(Id, Option<SealedBlob>)> {
        Ok((Id::of(content), Some(self.seal(content)?)))
    }

    fn seal(&self, content: &[u8]) -> Result<SealedBlob> {
        crypto::seal_blob(&self.key, self.compress, content)
    }

    fn seal_if_new(&self, id: &Id, content: &[u8]) -> Result<Option<SealedBlob>> {
        let failed = |_| Error::new(ErrorKind::Io, "another part of the run failed");
        if !self.known.lock().map_err(failed)?.claim(id) {
            return Ok(None);
        }
        self.seal(content).map(Some)
    }
}

/// What a parent point knows of a disk.
pub(crate) struct Parent {
    pub content: Arc<[Id]>,
}

/// A disk to store.
pub(crate) struct DiskTask {
    pub source: Arc<dyn VolumeSource>,
    pub chunk: Granularity,
    /// With an incremental: where clean chunks come from.
    pub parent: Option<Parent>,
}

/// What to do about one chunk.
enum Step {
    Clean,
    Zero,
    /// Parts to read; the rest of the chunk is zero.
    Read(Vec<Range>),
}

/// Cuts a disk's map into chunks.
struct Cutter {
    source: Arc<dyn VolumeSource>,
    chunk: Length,
    at: Offset,
    regions: VecDeque<Extent>,
    mapped: Offset,
    /// Nothing of these is read, and their turn has come.
    passed: Vec<Range>,
}

impl Cutter {
    /// The next chunk and what to do about it, or many at once of which nothing is read; `None` at the end of the disk.
    async fn next(&mut self) -> Result<Option<(Range, Step)>> {
        for passed in std::mem::take(&mut self.passed) {
            self.source.release(passed).await?;
        }
        if let Some(run) = self.run() {
            return Ok(Some(run));
        }
        let end = self.source.size().get();
        let length = self.chunk.get().min(end.saturating_sub(self.at.get()));
        let Some(chunk) = Range::new(self.at, Length::new(length)).ok().filter(|chunk| !chunk.is_empty())
        else {
            return Ok(None);
        };
        let (mut clean, mut read) = (false, Vec::new());
        let mut covered = chunk.start();
        while covered < chunk.end() {
            let Some(region) = self.regions.front().copied() else {
                self.fetch().await?;
                continue;
            };
            if let Some(part) = region.range.intersect(chunk) {
                match region.kind {
                    ExtentKind::Clean => clean = true,
                    ExtentKind::Zero => {}
                    ExtentKind::Data => read.push(part),
                }
            }
            covered = region.range.end().min(chunk.end());
            if region.range.end() > chunk.end() {
                break;
            }
            self.pass();
        }
        self.at = chunk.end();
        let whole_clean = clean && read.is_empty();
        if clean && !whole_clean {
            return Err(Error::new(
                ErrorKind::Source,
                format!("the disk's map calls part of chunk {chunk} clean and part of it changed"),
            ));
        }
        Ok(Some((
            chunk,
            if whole_clean {
                Step::Clean
            } else if read.is_empty() {
                Step::Zero
            } else {
                Step::Read(read)
            },
        )))
    }

    /// The whole chunks that lie in the region that is next, if nothing of it is read: a large disk has hundreds of
    /// thousands of them.
    fn run(&mut self) -> Option<(Range, Step)> {
        let region = self.regions.front()?;
        let step = match region.kind {
            ExtentKind::Clean => Step::Clean,
            ExtentKind::Zero => Step::Zero,
            ExtentKind::Data => return None,
        };
        let chunk = self.chunk.get().max(1);
        let left = region.range.end().get().checked_sub(self.at.get())?;
        let whole = Length::new(left / chunk * chunk);
        let run = Range::new(self.at, whole).ok().filter(|run| !run.is_empty())?;
        if region.range.start() > self.at {
            return None;
        }
        if left == whole.get() {
            self.pass();
        }
        self.at = run.end();
        Some((run, step))
    }

    /// Leaves the region that is next behind.
    fn pass(&mut self) {
        let passed = self.regions.pop_front();
        self.passed.extend(
            passed
                .filter(|region| !is_large(region) && region.kind != ExtentKind::Data)
                .map(|region| region.range),
        );
    }

    async fn fetch(&mut self) -> Result<()> {
        let regions = self.source.regions(self.mapped).await?;
        let Some(last) = regions.last() else {
            return Err(Error::new(ErrorKind::Source, "the disk's map ends before the disk does"));
        };
        let mapped = last.range.end();
        for region in &regions {
            if region.kind != ExtentKind::Data && is_large(region) {
                self.source.release(region.range).await?;
            }
        }
        self.mapped = mapped;
        self.regions.extend(regions);
        Ok(())
    }
}

fn is_large(region: &Extent) -> bool {
    region.range.length() >= LARGE
}

/// The parts of a chunk, put together; whatever is not in `parts` is zero.
async fn read(source: &dyn VolumeSource, chunk: Range, parts: &[Range]) -> Result<Bytes> {
    if let [part] = parts
        && *part == chunk
        && chunk.length() <= MOST
    {
        let bytes = source.read(chunk).await?;
        source.release(chunk).await?;
        return Ok(bytes);
    }
    let length = usize::try_from(chunk.length().get()).unwrap_or(0);
    let mut whole = BytesMut::zeroed(length);
    for part in parts.iter().flat_map(|part| part.chunks(MOST)) {
        let bytes = source.read(part).await?;
        let start = usize::try_from(part.start().get().saturating_sub(chunk.start().get())).unwrap_or(length);
        let place = whole.get_mut(start..start.saturating_add(bytes.len()));
        place
            .ok_or_else(|| Error::new(ErrorKind::Source, "more was read than was asked for"))?
            .copy_from_slice(&bytes);
        source.release(part).await?;
    }
    Ok(whole.freeze())
}

/// Stores a disk, and returns the ids of its chunks.
pub(crate) async fn store(task: DiskTask, workshop: &Arc<Workshop>, saver: &mut Saver) -> Result<Vec<Id>> {
    let chunk = task.chunk.length();
    let size = task.source.size().get();
    let chunks = size.div_ceil(chunk.get().max(1));
    if let Some(parent) = &task.parent
        && parent.content.len() as u64 != chunks
    {
        return Err(Error::new(ErrorKind::Damaged, "the parent point has another number of chunks"));
    }
    let cutter = Cutter {
        source: Arc::clone(&task.source),
        chunk,
        at: Offset::ZERO,
        regions: VecDeque::new(),
        mapped: Offset::ZERO,
        passed: Vec::new(),
    };
    let mut zeroes = Zeroes { workshop: Arc::clone(workshop), known: Vec::new() };
    let mut content = Vec::with_capacity(usize::try_from(chunks).unwrap_or(0));
    let in_flight = usize::try_from(IN_FLIGHT / chunk.get().max(1)).unwrap_or(1).clamp(4, 24);
    let steps = stream::try_unfold(cutter, async |mut cutter| {
        let step = cutter.next().await?;
        Ok::<_, Error>(step.map(|step| (step, cutter)))
    });
    let work = steps.map(|step| {
        let (workshop, source) = (Arc::clone(workshop), Arc::clone(&task.source));
        async move {
            let (range, step) = step?;
            let parts = match step {
                Step::Read(parts) => parts,
                Step::Clean => return Ok((range, Made::Clean)),
                Step::Zero => return Ok((range, Made::Zero)),
            };
            let bytes = read(source.as_ref(), range, &parts).await?;
            let _thread = workshop.threads.acquire().await;
            let shop = Arc::clone(&workshop);
            let made = blocking(move || {
                if stillpoint_image::is_zero(&bytes) {
                    return Ok(Made::Zero);
                }
                let (id, sealed) = shop.work(&bytes)?;
                Ok(Made::Chunk(id, sealed))
            })
            .await?;
            Ok::<_, Error>((range, made))
        }
    });
    let mut work = std::pin::pin!(work.buffered(in_flight));
    while let Some(made) = work.next().await {
        let (range, made) = made?;
        let first = content.len();
        let count = usize::try_from(range.length().get().div_ceil(chunk.get().max(1))).unwrap_or(usize::MAX);
        match made {
            Made::Chunk(id, sealed) => {
                if let Some(sealed) = sealed {
                    saver.add(BlobKind::Data, id, sealed).await?;
                }
                content.push(id);
            }
            Made::Zero => {
                let id = zeroes.id(range.length().min(chunk).get(), saver).await?;
                content.extend(std::iter::repeat_n(id, count));
            }
            Made::Clean => {
                let parent = task.parent.as_ref();
                let ids = parent.and_then(|parent| parent.content.get(first..first.saturating_add(count)));
                content.extend_from_slice(ids.ok_or_else(|| {
                    Error::new(ErrorKind::Source, "the map has clean parts, but there is no parent")
                })?);
            }
        }
    }
    Ok(content)
}

enum Made {
    Clean,
    Zero,
    Chunk(Id, Option<SealedBlob>),
}

/// Chunks of zeroes: one blob for whole chunks and one for a shorter last one, stored when they are first met.
struct Zeroes {
    workshop: Arc<Workshop>,
    /// By length.
    known: Vec<(u64, Id)>,
}

impl Zeroes {
    async fn id(&mut self, length: u64, saver: &mut Saver) -> Result<Id> {
        if let Some((_, id)) = self.known.iter().find(|(known, _)| *known == length) {
            return Ok(*id);
        }
        let content = vec![0; usize::try_from(length).unwrap_or(0)];
        let (id, sealed) = self.workshop.work(&content)?;
        if let Some(sealed) = sealed {
            saver.add(BlobKind::Data, id, sealed).await?;
        }
        self.known.push((length, id));
        Ok(id)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use async_trait::async_trait;

    /// A disk with a map, which notes what is given back.
    struct Mapped {
        regions: Vec<Extent>,
        given_back: Mutex<Vec<Range>>,
    }

    #[async_trait]
    impl VolumeSource for Mapped {
        fn size(&self) -> Length {
            self.regions.iter().map(|region| region.range.length()).sum()
        }

        async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
            // Two at a time, so that the map is asked for again in the middle of a chunk.
            let rest = self.regions.iter().filter(|region| region.range.start() >= from);
            Ok(rest.take(2).copied().collect())
        }

        async fn read(&self, _: Range) -> Result<Bytes> {
            unreachable!("nothing is read here")
        }

        async fn release(&self, range: Range) -> Result<()> {
            self.given_back.lock().unwrap().push(range);
            Ok(())
        }
    }

    fn range(start: u64, end: u64) -> Range {
        Range::between(Offset::new(start << 10), Offset::new(end << 10)).unwrap()
    }

    #[tokio::test]
    async fn what_is_not_read_is_given_back_once_and_small_holes_only_when_they_are_passed() {
        let (mib, data) = (1 << 10, ExtentKind::Data);
        // In KiB: holes that are larger and smaller than a chunk, one that ends within a chunk, and one at the end.
        let borders = [
            (0, ExtentKind::Zero),
            (9 * mib, data),
            (10 * mib, ExtentKind::Zero),
            (12 * mib + 64, data),
            (13 * mib, data),
            (13 * mib + 8, ExtentKind::Zero),
            (13 * mib + 16, data),
            (15 * mib, ExtentKind::Zero),
            (15 * mib + 512, data),
        ];
        let ends = borders.iter().skip(1).map(|(start, _)| *start).chain([16 * mib]);
        let regions: Vec<_> = borders
            .iter()
            .zip(ends)
            .map(|((start, kind), end)| Extent { range: range(*start, end), kind: *kind })
            .collect();
        let source = Arc::new(Mapped { regions, given_back: Mutex::default() });
        let given_back = || std::mem::take(&mut *source.given_back.lock().unwrap());
        let mut cutter = Cutter {
            source: source.clone(),
            chunk: Length::new(1 << 20),
            at: Offset::ZERO,
            regions: VecDeque::new(),
            mapped: Offset::ZERO,
            passed: Vec::new(),
        };
        let (mut steps, mut all) = (Vec::new(), Vec::new());
        loop {
            let Some((part, step)) = cutter.next().await.unwrap() else { break };
            let read = match step {
                Step::Zero => Vec::new(),
                Step::Read(parts) => parts,
                Step::Clean => panic!("nothing is clean"),
            };
            let released = given_back();
            all.extend(released.iter().copied());
            steps.push((part, read, released));
        }
        all.extend(given_back());
        let expected = [
            (0, 9 * mib),
            (10 * mib, 12 * mib + 64),
            (13 * mib + 8, 13 * mib + 16),
            (15 * mib, 15 * mib + 512),
        ];
        assert_eq!(all, expected.map(|(start, end)| range(start, end)));
        // The large hole at once; the next one when its last chunk was cut, and not before.
        assert_eq!(steps[0].2, [range(0, 9 * mib)]);
        let passed = steps.iter().position(|step| step.2.contains(&range(10 * mib, 12 * mib + 64))).unwrap();
        assert!(steps[..passed].iter().any(|step| step.1 == [range(12 * mib + 64, 13 * mib)]), "{passed}");
        let read: Vec<_> = steps.iter().flat_map(|step| step.1.iter().copied()).collect();
        assert_eq!(
            read.iter().map(|part| part.length()).sum::<Length>(),
            Length::new(((16 * mib) << 10) - all.iter().map(|part| part.length().get()).sum::<u64>())
        );
    }
}
