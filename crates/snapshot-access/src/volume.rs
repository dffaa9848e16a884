//! One disk at its point, as a provider reads it.

use crate::{
    direct::{DirectImage, Proof, Proven, join},
    discard::DiscardPlanner,
    fleecing::FleecingImage,
    guest::IoError,
    layers::Allocated,
    reserve::SpaceState,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};
use stillpoint_buffer as buffer;
use stillpoint_model::{DiskName, Extent, ExtentKind, Granularity, Length, Offset, Range};
use stillpoint_nbd::{Client, MetaContext};
use stillpoint_provider::{Error, ErrorKind, Result, VolumeSource};
use tokio::sync::watch;

/// The most that a provider may read at once; what NBD servers take.
const READ_MOST: Length = Length::new(32 << 20);
/// How much of the map is looked at in one go.
const MAP_WINDOW: Length = Length::new(16 << 30);

/// The first QEMU whose snapshot access reads a range right in which some clusters were kept aside and some not.
///
/// Before, `hbitmap_status()` calls a run of set bits unset when an unset one follows within the range asked about. So
/// the filter takes clusters that the guest has overwritten from the disk instead of from the fleecing image: the reader
/// gets the guest's new data, or, from a block status, the new data's zeroes. Seen on 7.2, not on 10.0; corrected upstream early in 2023, so 8.1 has it for certain. ADR 0006.
const MIXED_READS_FROM: (u32, u32, u32) = (8, 1, 0);

/// How much one read may span on this QEMU. Within one cluster all bits are the same, and the fault cannot show.
pub(crate) fn reads_within(qemu: (u32, u32, u32), cluster: Granularity, unwritten: bool) -> Length {
    if qemu < MIXED_READS_FROM && !unwritten { cluster.length() } else { READ_MOST }
}

/// Why all reading has to end.
#[derive(Debug, Clone)]
pub(crate) enum Stop {
    Cancelled,
    OverBudget {
        used: Length,
        budget: Length,
    },
    /// Old data would have taken what the guest's own writes may need. `None` if only that is known.
    LowSpace {
        space: Option<SpaceState>,
        used: Length,
    },
    Migration {
        state: String,
    },
    /// The guest stopped, or will, since the host's storage fails it.
    IoError(IoError),
    /// QEMU does not answer.
    Silent,
}

/// One disk of a held instant. It reads through two connections, since QEMU answers a block status request for all of
/// a connection's contexts or for none, and the allocation of what was already discarded cannot be told.
pub(crate) struct AccessVolume {
    pub(crate) name: DiskName,
    pub(crate) size: Length,
    /// Data, and which of it reads as zeroes.
    pub(crate) data: Client,
    /// What the bitmap says, where the disk has one for this run.
    pub(crate) dirty: Option<(Client, MetaContext)>,
    /// What is dirty besides: what images have that are above the bitmap's.
    pub(crate) allocated: Option<Arc<Allocated>>,
    /// `None` if nothing is given back before the end.
    pub(crate) discards: Option<Mutex<DiscardPlanner>>,
    /// Where old data is kept aside, if a guest runs that could overwrite it.
    pub(crate) fleecing: Option<Arc<FleecingImage>>,
    /// The image itself, where it may be read past QEMU.
    pub(crate) image: Option<Arc<DirectImage>>,
    /// Tells what of such a read is right, if a guest runs.
    pub(crate) proof: Option<Arc<Proof>>,
    /// The most that one read may span: see [`reads_within`].
    pub(crate) piece: Length,
    pub(crate) stop: watch::Receiver<Option<Stop>>,
    pub(crate) read: AtomicU64,
    /// Bytes of those that did not come through QEMU.
    pub(crate) past_qemu: AtomicU64,
    pub(crate) passed: AtomicU64,
}

impl AccessVolume {
    /// Bytes read so far.
    pub(crate) fn read_bytes(&self) -> Length {
        Length::new(self.read.load(Ordering::Relaxed))
    }

    /// Bytes given back so far, read or not: how far the backup of the disk has come.
    pub(crate) fn passed_bytes(&self) -> Length {
        Length::new(self.passed.load(Ordering::Relaxed))
    }

    /// Ends both connections, after what is in flight: QEMU's server must not be stopped under them (CVE-2024-7409).
    pub(crate) async fn close(&self) {
        let past_qemu = self.past_qemu.load(Ordering::Relaxed);
        tracing::debug!(disk = %self.name, read = self.read_bytes().get(), past_qemu, "bytes read");
        let end = async |client: Option<Client>| {
            let Some(client) = client else { return };
            if let Err(error) = client.disconnect().await {
                tracing::debug!(disk = %self.name, %error, "an NBD connection did not end well");
            }
        };
        let map = self.dirty.as_ref().map(|(client, _)| client.clone());
        tokio::join!(end(Some(self.data.clone())), end(map));
    }

    /// Ends both connections at once, for a QEMU that does not answer.
    pub(crate) fn abandon(&self) {
        self.data.abandon();
        if let Some((client, _)) = &self.dirty {
            client.abandon();
        }
    }

    /// Gives back everything that is clean at once, so that QEMU stops keeping aside what nobody will read.
    pub(crate) async fn discard_clean(&self) -> Result<()> {
        let mut at = Offset::ZERO;
        while at.get() < self.size.get() {
            let parts = self.dirty_map(at).await?;
            for part in &parts {
                if part.kind == ExtentKind::Clean {
                    self.discard(|planner| planner.release(part.range)).await?;
                }
            }
            at = parts.last().map_or(Offset::new(self.size.get()), |part| part.range.end());
        }
        self.discard(DiscardPlanner::flush).await
    }

    /// How much the bitmap calls dirty (all of it without one). Walks the whole map, which is also the proof that it
    /// is complete (I7).
    pub(crate) async fn dirty_bytes(&self) -> Result<Length> {
        let (mut at, mut dirty) = (Offset::ZERO, Length::ZERO);
        while at.get() < self.size.get() {
            let parts = self.dirty_map(at).await?;
            let dirty_parts = parts.iter().filter(|part| part.kind == ExtentKind::Data);
            dirty = dirty.saturating_add(dirty_parts.map(|part| part.range.length()).sum());
            at = parts.last().map_or(Offset::new(self.size.get()), |part| part.range.end());
        }
        Ok(dirty)
    }

    /// Clean and data, by the bitmap alone, from `from` on.
    async fn dirty_map(&self, from: Offset) -> Result<Vec<Extent>> {
        let rest = Length::new(self.size.get().saturating_sub(from.get()));
        let Some((client, context)) = &self.dirty else {
            let window = Length::new(rest.get().min(MAP_WINDOW.get()));
            let range =
                Range::new(from, window).map_err(|error| self.unreadable("map", None).because(error))?;
            return Ok(vec![Extent { range, kind: ExtentKind::Data }]);
        };
        let map = self.unless_stopped(client.map(context, from, MAP_WINDOW)).await?;
        let map = map.map_err(|error| self.unreadable("ask for what changed on", None).because(error))?;
        let kind = |dirty| if dirty { ExtentKind::Data } else { ExtentKind::Clean };
        let mut parts = Vec::new();
        for part in map {
            match &self.allocated {
                Some(allocated) if !part.is_dirty(context) => {
                    let cut = allocated.parts(part.range).into_iter();
                    parts.extend(cut.map(|(range, dirty)| Extent { range, kind: kind(dirty) }));
                }
                _ => parts.push(Extent { range: part.range, kind: kind(part.is_dirty(context)) }),
            }
        }
        Ok(parts)
    }

    /// Splits a part that has to be read into what reads as zeroes and what does not.
    async fn allocation(&self, range: Range, into: &mut Vec<Extent>) -> Result<()> {
        let context = MetaContext::base_allocation();
        let map = self.unless_stopped(self.data.map(&context, range.start(), range.length())).await?;
        let map = match map {
            Ok(map) => map,
            Err(error) => return Err(self.describe(range, error).await),
        };
        for part in map {
            match &self.fleecing {
                _ if !part.is_zero(&context) => {
                    into.push(Extent { range: part.range, kind: ExtentKind::Data })
                }
                // QEMU's word can be relied on where mixed reads can.
                Some(fleecing) if self.piece < READ_MOST => {
                    let (fleecing, range, size) = (Arc::clone(fleecing), part.range, self.size);
                    // In a thread that may be given up, since storage that hangs does not answer to this either.
                    let asked = tokio::task::spawn_blocking(move || zero_unless_kept(&fleecing, range, size));
                    let parts = self.unless_stopped(asked).await?;
                    into.extend(parts.map_err(|error| self.unreadable("map", Some(range)).because(error))?);
                }
                _ => into.push(Extent { range: part.range, kind: ExtentKind::Zero }),
            }
        }
        Ok(())
    }

    async fn read_export(&self, range: Range) -> Result<Bytes> {
        match self.unless_stopped(self.data.read_in_parts(range, self.piece)).await? {
            Ok(data) => Ok(data),
            Err(error) => Err(self.describe(range, error).await),
        }
    }

    /// Reads the image itself, and what was kept aside through QEMU. Whatever is in the way of that, QEMU may not mind.
    async fn read_image(&self, image: &Arc<DirectImage>, range: Range) -> Result<Bytes> {
        let (mut bytes, elsewhere) = match self.unless_stopped(image.read(range)).await? {
            Ok(read) => read,
            Err(error) => {
                tracing::debug!(disk = %self.name, %range, %error, "an image was not read directly");
                return self.read_export(range).await;
            }
        };
        // In this order: the module `direct` says why. Where no guest runs, nothing changes.
        let proven = match &self.proof {
            None => Proven::But(Vec::new()),
            Some(proof) => self.unless_stopped(proof.of(range)).await?,
        };
        match proven {
            Proven::But(kept) => {
                let mut kept = [kept, elsewhere].concat();
                kept.sort_by_key(|part| part.start());
                let kept = join(kept.into_iter());
                let through: Length = kept.iter().map(|part| part.length()).sum();
                self.past_qemu
                    .fetch_add(range.length().get().saturating_sub(through.get()), Ordering::Relaxed);
                for part in kept {
                    let old = self.read_export(part).await?;
                    overwrite(&mut bytes, range, part, &old)
                        .ok_or_else(|| self.unreadable("put together", Some(part)))?;
                }
                Ok(buffer::freeze(bytes))
            }
            Proven::Broken(error) => Err(self.describe(range, error).await),
            Proven::Unknown => self.read_export(range).await,
        }
    }

    /// Discards what `planned` says.
    async fn discard(&self, planned: impl FnOnce(&mut DiscardPlanner) -> Vec<Range>) -> Result<()> {
        let Some(discards) = self.discards.as_ref().filter(|_| self.fleecing.is_some()) else {
            return Ok(());
        };
        let planned = planned(&mut discards.lock().unwrap_or_else(PoisonError::into_inner));
        for discard in planned {
            let trimmed = self.unless_stopped(self.data.trim(discard)).await?;
            trimmed.map_err(|error| self.unreadable("discard old data of", Some(discard)).because(error))?;
        }
        Ok(())
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        let mut stop = self.stop.clone();
        let stopped = async {
            match stop.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or(Stop::Cancelled),
                Err(_) => Stop::Cancelled,
            }
        };
        tokio::select! {
            biased;
            reason = stopped => Err(self.stopped(&reason)),
            done = work => Ok(done),
        }
    }

    fn stopped(&self, reason: &Stop) -> Error {
        match reason {
            Stop::Cancelled => Error::new(ErrorKind::Cancelled, "the run was cancelled"),
            Stop::Migration { state } => Error::new(
                ErrorKind::Source,
                format!("somebody began to migrate this VM (status {state}), so the run made way"),
            ),
            Stop::LowSpace { space: Some(SpaceState { directory, free, reserve }), used } => Error::new(
                ErrorKind::Source,
                format!(
                    "the file system of {} came down to {free} bytes free; {reserve} are left to the guest's own writes, so the \
                     old data of this run ({used} bytes) was given up; disk {} could need up to {} bytes",
                    directory.display(),
                    self.name,
                    self.size
                ),
            ),
            Stop::LowSpace { space: None, .. } => Error::new(
                ErrorKind::Source,
                format!("the host ran low on space, and the old data of disk {} was given up", self.name),
            ),
            Stop::IoError(error) => {
                let stops = if error.stops { ", which stopped the guest (io-error)" } else { "" };
                let context = format!(
                    "{error}{stops}; the run gave up its snapshot at once, so that the guest can go on"
                );
                Error::new(ErrorKind::Source, context)
            }
            Stop::Silent => Error::new(
                ErrorKind::Source,
                format!("disk {} can no longer be read: QEMU does not answer", self.name),
            ),
            Stop::OverBudget { used, budget } => Error::new(
                ErrorKind::Source,
                format!(
                    "the fleecing images hold {used} bytes, over the budget of {budget}; disk {} could need up to {} bytes",
                    self.name, self.size
                ),
            ),
        }
    }

    /// What was read before this is called is right only if the old data was all there until now.
    fn still_held<T>(&self, done: Result<T>) -> Result<T> {
        let whole = self.fleecing.as_ref().is_none_or(|fleecing| fleecing.is_whole());
        if whole {
            return done;
        }
        let reason = self.stop.borrow().clone();
        Err(self.stopped(&reason.unwrap_or(Stop::LowSpace { space: None, used: Length::ZERO })))
    }

    async fn regions_of(&self, from: Offset) -> Result<Vec<Extent>> {
        let mut regions = Vec::new();
        if from.get() >= self.size.get() {
            return Ok(regions);
        }
        for part in self.dirty_map(from).await? {
            match part.kind {
                ExtentKind::Data => self.allocation(part.range, &mut regions).await?,
                ExtentKind::Clean | ExtentKind::Zero => regions.push(part),
            }
            // A batch ends where it is long enough; the caller goes on from there.
            if regions.len() >= 1024 {
                break;
            }
        }
        Ok(regions)
    }

    fn unreadable(&self, doing: &str, range: Option<Range>) -> Error {
        let place = range
            .map(|range| format!(" at {} ({} bytes)", range.start(), range.length()))
            .unwrap_or_default();
        Error::new(ErrorKind::Source, format!("cannot {doing} disk {}{place}", self.name))
    }

    /// QEMU says EINVAL for a read outside the bitmap, of a discarded part, and after the snapshot broke. The first
    /// two are bugs on this side of the socket; the third is told by the fleecing image.
    async fn describe(&self, range: Range, error: stillpoint_nbd::Error) -> Error {
        let server = matches!(error.kind(), stillpoint_nbd::ErrorKind::Server { .. });
        let Some(fleecing) = self.fleecing.as_ref().filter(|_| server) else {
            return self.unreadable("read", Some(range)).because(error);
        };
        let directory = fleecing.directory().display();
        let (used, why) = if fleecing.answers(false).await {
            let why = match fleecing.free() {
                Some(free) if free.get() < 16 << 20 => {
                    format!("the file system of {directory} is full ({free} bytes free)")
                }
                _ => format!(
                    "fleecing storage in {directory} failed or was too slow, or the part was not to be read"
                ),
            };
            (fleecing.used().to_string(), why)
        } else {
            ("an unknown number of".to_owned(), format!("fleecing storage in {directory} hangs"))
        };
        let context = format!(
            "disk {} can no longer be read as it was at the point (at {}): {why}; the fleecing image holds {used} bytes and \
             could need up to {} bytes",
            self.name,
            range.start(),
            self.size
        );
        Error::new(ErrorKind::Source, context).because(error)
    }
}

/// Takes QEMU's word that a part reads as zeroes only where the fleecing image holds nothing: see
/// [`MIXED_READS_FROM`]. What was overwritten since the instant and was not zero before is in the fleecing image by the
/// time QEMU could call it zero.
fn zero_unless_kept(fleecing: &FleecingImage, range: Range, size: Length) -> Vec<Extent> {
    let mut parts = Vec::new();
    let mut rest = range;
    while let Some(kept) = fleecing.first_data(rest) {
        let kept = kept.align_outward(Granularity::DEFAULT, size).intersect(rest).unwrap_or(rest);
        let (zero, from_kept) = rest.split(kept.start());
        let (kept, after) = from_kept.split(kept.end());
        if !zero.is_empty() {
            parts.push(Extent { range: zero, kind: ExtentKind::Zero });
        }
        parts.push(Extent { range: kept, kind: ExtentKind::Data });
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Extent { range: rest, kind: ExtentKind::Zero });
    }
    parts
}

/// Puts `data`, which is `part`, into `bytes`, which are `range`.
fn overwrite(bytes: &mut BytesMut, range: Range, part: Range, data: &[u8]) -> Option<()> {
    let start = usize::try_from(part.start().get().checked_sub(range.start().get())?).ok()?;
    bytes.get_mut(start..start.checked_add(data.len())?)?.copy_from_slice(data);
    Some(())
}

#[async_trait]
impl VolumeSource for AccessVolume {
    fn size(&self) -> Length {
        self.size
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let regions = self.regions_of(from).await;
        self.still_held(regions)
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        let data = match &self.image {
            Some(image) => self.read_image(image, range).await,
            None => self.read_export(range).await,
        };
        let data = self.still_held(data)?;
        self.read.fetch_add(range.length().get(), Ordering::Relaxed);
        Ok(data)
    }

    async fn release(&self, range: Range) -> Result<()> {
        self.discard(|planner| planner.release(range)).await?;
        self.passed.fetch_add(range.length().get(), Ordering::Relaxed);
        Ok(())
    }

    async fn ended(&self) -> Error {
        match self.unless_stopped(std::future::pending::<()>()).await {
            Ok(()) => self.stopped(&Stop::Cancelled),
            Err(error) => error,
        }
    }
}

#[cfg(test)]
mod test;
