//! Disks in memory that behave as they are told.

use async_trait::async_trait;
use bytes::Bytes;
use std::time::Duration;
use stillpoint_model::{Extent, ExtentKind, Length, Offset, Range};
use stillpoint_provider::{Error, ErrorKind, Result, VolumeSource};

/// Changes are told in parts of this size.
const GRANULE: usize = 64 << 10;
/// Of a slow disk, each read.
const SLOW: Duration = Duration::from_millis(100);
/// How long a run goes on before it is cancelled.
const CANCELLED_AFTER: Duration = Duration::from_millis(200);

/// How a disk behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    /// As it should.
    Good,
    /// Cannot be read.
    Fails,
    /// Is slow.
    Slow,
    /// Cannot be read before the run is cancelled, nor after it.
    Cancelled,
}

pub(super) struct ScriptedDisk {
    content: Bytes,
    extents: Vec<Extent>,
    behaviour: Behaviour,
}

impl ScriptedDisk {
    /// A disk of this content; with `base`, only what is different from it can be read.
    pub(super) fn new(content: &[u8], base: Option<&[u8]>, behaviour: Behaviour) -> Self {
        let mut extents = Vec::new();
        for (index, granule) in content.chunks(GRANULE).enumerate() {
            let start = index * GRANULE;
            let same = base.and_then(|base| base.get(start..start + granule.len())) == Some(granule);
            let kind = match base {
                Some(_) if same => ExtentKind::Clean,
                _ if granule.iter().all(|byte| *byte == 0) => ExtentKind::Zero,
                _ => ExtentKind::Data,
            };
            if let Ok(range) = Range::new(Offset::new(start as u64), Length::new(granule.len() as u64)) {
                extents.push(Extent { range, kind });
            }
        }
        Self { content: Bytes::copy_from_slice(content), extents, behaviour }
    }
}

#[async_trait]
impl VolumeSource for ScriptedDisk {
    fn size(&self) -> Length {
        Length::new(self.content.len() as u64)
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        Ok(self.extents.iter().copied().filter(|extent| extent.range.start() >= from).collect())
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        match self.behaviour {
            Behaviour::Good => {}
            Behaviour::Fails => return Err(Error::new(ErrorKind::Source, "this disk cannot be read")),
            Behaviour::Slow => tokio::time::sleep(SLOW).await,
            Behaviour::Cancelled => return Err(self.ended().await),
        }
        let at = |offset: Offset| usize::try_from(offset.get()).ok().filter(|at| *at <= self.content.len());
        match (at(range.start()), at(range.end())) {
            (Some(start), Some(end)) => Ok(self.content.slice(start..end)),
            _ => Err(Error::new(ErrorKind::Source, "beyond the end")),
        }
    }

    async fn release(&self, _range: Range) -> Result<()> {
        Ok(())
    }

    async fn ended(&self) -> Error {
        if self.behaviour != Behaviour::Cancelled {
            return std::future::pending().await;
        }
        tokio::time::sleep(CANCELLED_AFTER).await;
        Error::new(ErrorKind::Cancelled, "cancelled")
    }
}
