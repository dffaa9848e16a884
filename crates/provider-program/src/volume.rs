//! A disk on its way to a program: every read is checked, counted and paced here, whatever way it comes by.

use crate::{protocol, rpc::Activity};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use stillpoint_model::{DiskName, Extent, ExtentKind, Length, Offset, Range};
use stillpoint_nbd::{
    Errno,
    server::{Export, Refusal},
};
use stillpoint_provider::{BitmapMode, Error, ErrorKind, Result, Volume, VolumeSource};

/// The name under which the map of dirty parts is negotiated; clients that know QEMU's bitmaps know what it means.
pub(crate) const DIRTY_CONTEXT: &str = "qemu:dirty-bitmap:stillpoint";

/// A disk that a program reads.
pub(crate) struct ServedVolume {
    pub(crate) name: DiskName,
    incremental: bool,
    source: Arc<dyn VolumeSource>,
    /// As it was when the disk was handed over: what is given back later has no map any more.
    map: Map,
    pace: Option<Arc<Pace>>,
    activity: Activity,
    /// What was read without an error.
    read: Mutex<Ranges>,
    /// The first error that reading the disk itself gave.
    failure: Mutex<Option<(ErrorKind, String)>>,
}

impl ServedVolume {
    /// Reads the whole map, which proves that it is complete (I7).
    ///
    /// # Errors
    /// If it is not.
    pub(crate) async fn new(volume: &Volume, pace: Option<Arc<Pace>>, activity: Activity) -> Result<Self> {
        Ok(Self {
            map: Map::read(volume.source.as_ref()).await?,
            name: volume.name.clone(),
            incremental: volume.bitmap_mode == BitmapMode::Reuse,
            source: Arc::clone(&volume.source),
            pace,
            activity,
            read: Mutex::default(),
            failure: Mutex::default(),
        })
    }

    pub(crate) fn size(&self) -> Length {
        self.source.size()
    }

    pub(crate) fn has_map(&self) -> bool {
        self.incremental
    }

    /// Reads, at the pace that is allowed.
    ///
    /// # Errors
    /// As [`VolumeSource::read`].
    pub(crate) async fn read(&self, range: Range) -> Result<Bytes> {
        let read = self.fetch(range).await;
        match &read {
            Ok(_) => self.was_read(range),
            // The program's mistake, not the disk's.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {}
            Err(error) => {
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert_with(|| (error.kind(), crate::rpc::chain(error)));
            }
        }
        read
    }

    /// The program has got these bytes.
    pub(crate) fn was_read(&self, range: Range) {
        self.activity.seen();
        self.lock_read().insert(range);
    }

    /// Reads what the program may ask for next, or may give back without asking for it: an error is nobody's yet, and nothing was
    /// read by the program. See [`Self::was_read`].
    ///
    /// # Errors
    /// As [`VolumeSource::read`].
    pub(crate) async fn fetch(&self, range: Range) -> Result<Bytes> {
        self.activity.seen();
        let mut data = false;
        for extent in
            self.map.from(range.start().get()).take_while(|extent| extent.range.start() < range.end())
        {
            data |= extent.kind == ExtentKind::Data;
            if extent.kind == ExtentKind::Clean {
                let what = format!(
                    "disk {} at {} is outside of what has changed since the point before, and cannot be read",
                    self.name,
                    extent.range.start()
                );
                return Err(Error::new(ErrorKind::InvalidInput, what));
            }
        }
        if !data {
            return Ok(zeroes(range.length()));
        }
        if let Some(pace) = &self.pace {
            pace.take(range.length()).await;
        }
        let read = self.source.read(range).await;
        self.activity.seen();
        read
    }

    /// The parts of the disk from `from` on, contiguous; some thousands at once.
    pub(crate) fn regions(&self, from: Offset) -> impl Iterator<Item = Extent> {
        self.all_regions(from).take(MOST_REGIONS)
    }

    /// The same to the end of the disk.
    pub(crate) fn all_regions(&self, from: Offset) -> impl Iterator<Item = Extent> {
        self.map.from(from.get())
    }

    pub(crate) async fn release(&self, range: Range) -> Result<()> {
        self.activity.seen();
        self.source.release(range).await
    }

    /// Waits until reading can only fail.
    pub(crate) async fn ended(&self) -> Error {
        self.source.ended().await
    }

    /// All dirty regions up to some point, for `next_dirty_regions`.
    pub(crate) fn dirty_regions(&self, from: Offset) -> Result<protocol::NextDirtyRegionsAnswer> {
        if from.get() > self.size().get() {
            return Err(Error::new(ErrorKind::InvalidInput, format!("{from} is beyond the end of the disk")));
        }
        if from.get() == self.size().get() {
            return Ok(protocol::NextDirtyRegionsAnswer { regions: Vec::new(), next: None });
        }
        let extents: Vec<_> = self.regions(from).collect();
        let end = extents.last().map_or(from, |extent| extent.range.end());
        let dirty = extents.iter().filter(|extent| extent.kind != ExtentKind::Clean);
        let region = |extent: &Extent| protocol::WireRegion {
            offset: extent.range.start(),
            length: extent.range.length(),
            zero: extent.kind == ExtentKind::Zero,
        };
        let next = (end.get() < self.size().get()).then_some(end);
        Ok(protocol::NextDirtyRegionsAnswer { regions: dirty.map(region).collect(), next })
    }

    /// What has to be in the point and was never read: a program that leaves something out is wrong, whatever it says.
    ///
    /// # Errors
    /// If so.
    pub(crate) fn prove_read(&self) -> Result<()> {
        let read = self.lock_read();
        let data = self.map.from(0).filter(|extent| extent.kind == ExtentKind::Data);
        for extent in data {
            if let Some(missing) = read.first_missing(extent.range) {
                let what = format!(
                    "the provider says that it has all of disk {}, but has not read what is at {missing}",
                    self.name
                );
                return Err(Error::new(ErrorKind::Io, what));
            }
        }
        Ok(())
    }

    /// The first error of the disk itself, which says more than what a program makes of it.
    pub(crate) fn failure(&self) -> Option<Error> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_ref().map(|(kind, what)| Error::new(*kind, what.clone()))
    }

    fn lock_read(&self) -> std::sync::MutexGuard<'_, Ranges> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Zeroes, of which as many as are mostly asked for are always at hand.
fn zeroes(length: Length) -> Bytes {
    static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
    let length = usize::try_from(length.get()).unwrap_or(0);
    ZEROES.get(..length).map_or_else(|| Bytes::from(vec![0; length]), Bytes::from_static)
}

fn refusal(error: &Error) -> Refusal {
    let errno = match error.kind() {
        ErrorKind::Cancelled => Errno::ESHUTDOWN,
        _ => Errno::EIO,
    };
    Refusal::new(errno, crate::rpc::chain(error))
}

#[async_trait]
impl Export for ServedVolume {
    fn size(&self) -> Length {
        self.source.size()
    }

    fn dirty_context(&self) -> Option<&str> {
        self.incremental.then_some(DIRTY_CONTEXT)
    }

    async fn read(&self, range: Range) -> Result<Bytes, Refusal> {
        Self::read(self, range).await.map_err(|error| refusal(&error))
    }

    async fn extents(&self, from: Offset) -> Result<Vec<Extent>, Refusal> {
        self.activity.seen();
        Ok(self.regions(from).collect())
    }

    async fn trim(&self, range: Range) -> Result<(), Refusal> {
        self.release(range).await.map_err(|error| refusal(&error))
    }
}

/// Most parts of a map that are told at once.
const MOST_REGIONS: usize = 4096;

/// A map of a whole disk: where each part begins, and its kind. Neighbours are of different kinds.
struct Map {
    parts: Vec<(u64, ExtentKind)>,
    size: u64,
}

impl Map {
    async fn read(source: &dyn VolumeSource) -> Result<Self> {
        let size = source.size().get();
        let (mut parts, mut at) = (Vec::<(u64, ExtentKind)>::new(), 0);
        while at < size {
            let before = at;
            for extent in source.regions(Offset::new(at)).await? {
                if extent.range.start().get() != at {
                    return Err(Error::new(ErrorKind::Source, format!("the map leaps at {at}")));
                }
                at = extent.range.end().get();
                if parts.last().is_none_or(|(_, kind)| *kind != extent.kind) {
                    parts.push((before.max(extent.range.start().get()), extent.kind));
                }
            }
            if at <= before || at > size {
                return Err(Error::new(
                    ErrorKind::Source,
                    format!("the map ends at {before}, not at {size}"),
                ));
            }
        }
        parts.shrink_to_fit();
        Ok(Self { parts, size })
    }

    fn from(&self, from: u64) -> impl Iterator<Item = Extent> {
        let first = self.parts.partition_point(|(start, _)| *start <= from).saturating_sub(1);
        let ends = self.parts.iter().skip(first + 1).map(|(start, _)| *start).chain([self.size]);
        let parts = self.parts.iter().skip(first).zip(ends);
        parts.filter_map(move |((start, kind), end)| {
            let start = (*start).max(from);
            let range = Range::new(Offset::new(start), Length::new(end.checked_sub(start)?)).ok()?;
            (range.length().get() > 0).then_some(Extent { range, kind: *kind })
        })
    }
}

/// Holds reading to so many bytes a second, all disks together.
pub(crate) struct Pace {
    bytes_per_second: u64,
    /// When everything that was taken so far has been paid for.
    paid: Mutex<Instant>,
}

/// What may be read at once after a while without reading.
const BURST: Duration = Duration::from_millis(100);

impl Pace {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), paid: Mutex::new(Instant::now()) }
    }

    async fn take(&self, bytes: Length) {
        let cost = Duration::from_secs_f64(bytes.get() as f64 / self.bytes_per_second as f64);
        let start = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let start = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
            *paid = start + cost;
            start + cost
        };
        tokio::time::sleep_until(start.into()).await;
    }
}

/// A set of bytes, as the ends of its stretches by their starts.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn insert(&mut self, range: Range) {
        let (mut start, mut end) = (range.start().get(), range.end().get());
        if let Some((before, until)) = self.0.range(..=start).next_back().map(|(a, b)| (*a, *b))
            && until >= start
        {
            start = before;
            end = end.max(until);
        }
        while let Some((after, until)) = self.0.range(start..=end).next().map(|(a, b)| (*a, *b)) {
            self.0.remove(&after);
            end = end.max(until);
        }
        self.0.insert(start, end);
    }

    fn first_missing(&self, range: Range) -> Option<u64> {
        let start = range.start().get();
        let covered = self.0.range(..=start).next_back().map_or(0, |(_, until)| *until).max(start);
        (covered < range.end().get()).then_some(covered)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range::new(Offset::new(start), Length::new(end - start)).unwrap()
    }

    #[test]
    fn a_set_of_ranges_knows_what_it_lacks() {
        let mut set = Ranges::default();
        for (start, end) in [(10, 20), (30, 40), (20, 25), (5, 12), (24, 31), (100, 110)] {
            set.insert(range(start, end));
        }
        assert_eq!(set.0.iter().collect::<Vec<_>>(), [(&5, &40), (&100, &110)]);
        assert_eq!(set.first_missing(range(5, 40)), None);
        assert_eq!(set.first_missing(range(4, 6)), Some(4));
        assert_eq!(set.first_missing(range(35, 50)), Some(40));
        assert_eq!(set.first_missing(range(105, 111)), Some(110));
    }

    #[tokio::test]
    async fn what_is_read_is_held_to_the_pace() {
        let pace = Pace::new(10 << 20);
        let started = Instant::now();
        for _ in 0..8 {
            pace.take(Length::new(1 << 20)).await;
        }
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(650), "8 MiB at 10 MiB/s took {took:?}");
    }
}
