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
};
use stillpoint_model::{BitmapName, DiskName, Granularity, NodeName};
use stillpoint_qmp::Qmp;

/// The chain's state on one disk during a run.
#[derive(Debug, Clone)]
pub(crate) struct ChainDisk {
    pub(crate) disk: DiskName,
    pub(crate) node: NodeName,
    pub(crate) new: BitmapName,
    pub(crate) earlier: Vec<BitmapName>,
    pub(crate) read_by: Option<BitmapName>,
    pub(crate) granularity: Granularity,
    pub(crate) persistent: bool,
}

/// The bitmaps of a run whose outcome is open.
#[must_use = "the outcome of the run decides which bitmaps stay"]
pub struct Chain {
    qmp: Qmp,
    disks: Vec<ChainDisk>,
}

impl Chain {
    pub(crate) fn new(qmp: Qmp, disks: Vec<ChainDisk>) -> Self {
        Self { qmp, disks }
    }

    /// The point is durable: drops what earlier points of this target left (I3).
    ///
    /// # Errors
    /// If a bitmap could not be dropped; then it goes with the next run, and the point is as good.
    pub async fn commit(self) -> Result<()> {
        let earlier = self.disks.iter().flat_map(|disk| disk.earlier.iter().map(move |name| (disk, name)));
        self.remove(earlier.collect()).await
    }

    /// The point will never be: drops the new bitmaps; the earlier ones have recorded all the while.
    ///
    /// # Errors
    /// If a bitmap could not be dropped; it harms nothing but memory, and goes with the next run.
    pub async fn roll_back(self) -> Result<()> {
        let new = self.disks.iter().map(|disk| (disk, &disk.new)).collect();
        self.remove(new).await
    }

    /// Nobody knows whether the point is durable: keeps both.
    pub fn keep_both(self) {}

    async fn remove(&self, bitmaps: Vec<(&ChainDisk, &BitmapName)>) -> Result<()> {
        let mut failure = None;
        for (disk, name) in bitmaps {
            let removed = self.qmp.execute(command::remove_bitmap(disk.node.as_str(), name.as_str())).await;
            match removed {
                Ok(_) => {}
                Err(error) if error.class().is_some() => {
                    tracing::debug!(disk = %disk.disk, bitmap = %name, desc = error.desc(), "bitmap not removed");
                }
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
