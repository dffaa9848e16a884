//! The bitmap chain: which changes a disk's bitmaps record, from run to run.
//!
//! Every bitmap of the chain records all the time, from before the instant of its point until it is dropped. So at any
//! moment, whoever dies, the bitmap of each point that a provider may hold covers everything written since that point
//! (I2), and there is nothing to merge:
//!
//! ```text
//!            before the instant        instant        reading          provider commits
//!  old  -----recording----------------------------------------------------------|  dropped
//!  new                |-----recording----------------------------------------------------->
//!  read                                   |--frozen copy of old--|
//! ```
//!
//! | a run that ends so        | keeps      | because                                            |
//! |---------------------------|------------|----------------------------------------------------|
//! | committed                 | new        | the provider holds the new point (I3)              |
//! | failed                    | old        | the provider holds the old point only              |
//! | end unknown, or it died   | both       | the next run asks the provider which one it holds  |

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    inspect::qmp_error,
    steps::{Steps, has_ended},
};
use stillpoint_model::{BitmapName, DiskName, Granularity, NodeName};
use stillpoint_qmp::Qmp;

/// The chain's state on one disk during a run.
#[derive(Debug, Clone)]
pub(crate) struct ChainDisk {
    pub(crate) disk: DiskName,
    pub(crate) node: NodeName,
    /// `None` where a bitmap would be lost with the process that holds it.
    pub(crate) new: Option<BitmapName>,
    pub(crate) earlier: Vec<BitmapName>,
    /// What the run reads by: the bitmap of the point that it is relative to, and where images are above that one's, the new bitmap too,
    /// which records what they are given while it is asked what they have.
    pub(crate) read_by: Vec<(NodeName, BitmapName)>,
    pub(crate) granularity: Granularity,
    pub(crate) persistent: bool,
}

/// The bitmaps of a run whose outcome is open, and what else is settled only with it.
#[must_use = "the outcome of the run decides which bitmaps stay"]
pub struct Chain {
    qmp: Qmp,
    disks: Vec<ChainDisk>,
    steps: Steps,
    held_power: bool,
}

impl Chain {
    pub(crate) fn new(qmp: Qmp, disks: Vec<ChainDisk>, steps: Steps, held_power: bool) -> Self {
        Self { qmp, disks, steps, held_power }
    }

    /// The point is durable: drops what earlier points of this target left (I3). Like each of the three ways to end it,
    /// this ends QEMU if the guest has powered itself off meanwhile, and tells whether it has.
    ///
    /// # Errors
    /// [`ErrorKind::LeftBehind`] if the guest's power-off could not be granted, else if a bitmap could not be dropped; then
    /// it goes with the next run, and the point is as good.
    pub async fn commit(self) -> Result<bool> {
        let earlier = self.disks.iter().flat_map(|disk| disk.earlier.iter().map(move |name| (disk, name)));
        let removed = self.remove(earlier.collect()).await;
        self.end(removed).await
    }

    /// The point will never be: drops the new bitmaps; the earlier ones have recorded all the while.
    ///
    /// # Errors
    /// If a bitmap could not be dropped; it harms nothing but memory, and goes with the next run.
    pub async fn roll_back(self) -> Result<bool> {
        let new = self.disks.iter().filter_map(|disk| Some((disk, disk.new.as_ref()?))).collect();
        let removed = self.remove(new).await;
        self.end(removed).await
    }

    /// Nobody knows whether the point is durable: keeps both.
    ///
    /// # Errors
    /// If the guest's power-off could not be granted.
    pub async fn keep_both(self) -> Result<bool> {
        self.end(Ok(())).await
    }

    async fn end(self, removed: Result<()>) -> Result<bool> {
        // What is left of the run weighs more than a bitmap.
        let ended = self.steps.end(&self.qmp, self.held_power).await?;
        removed.map(|()| ended)
    }

    async fn remove(&self, bitmaps: Vec<(&ChainDisk, &BitmapName)>) -> Result<()> {
        let mut failure = None;
        for (disk, name) in bitmaps {
            let remove = command::remove_bitmap(disk.node.as_str(), name.as_str());
            let mut removed = self.qmp.execute(remove.clone()).await;
            if removed.is_err() && self.qmp.is_silent() && self.qmp.answers_again().await {
                removed = self.qmp.execute(remove).await;
            }
            match removed {
                Ok(_) => {}
                // Such as one in an image that others are above of: QEMU has that for reading only.
                Err(error) if error.class().is_some() => {
                    tracing::debug!(disk = %disk.disk, bitmap = %name, desc = error.desc(), "bitmap not removed");
                }
                // Without its QEMU a bitmap is either stored or gone, and the next run sees which.
                Err(_) if has_ended(&self.qmp).await => return Ok(()),
                Err(error) => {
                    let error = qmp_error(&format!("drop a bitmap of disk {}", disk.disk), error);
                    failure.get_or_insert(
                        Error::new(ErrorKind::Qmp, "the bitmaps could not be put in order").because(error),
                    );
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }
}
