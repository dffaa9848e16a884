//! The provider itself.

use crate::{
    backup::{DirectoryBackup, Step},
    error::blocking,
    identity, listing,
    restore::DirectoryRestore,
    target,
    verify::Verify,
};
use async_trait::async_trait;
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use stillpoint_model::{PointId, TargetId, VmName};
use stillpoint_provider::{Backup, PointSummary, Progress, Provider, Restore, Result, VerifyReport};

/// Keeps points as plain images in a directory.
#[derive(Debug, Clone)]
pub struct DirectoryProvider {
    path: PathBuf,
    /// Where a test wants the next commit to end as if by a crash.
    pub(crate) stop_before: Option<Step>,
}

impl DirectoryProvider {
    /// A provider for the target directory `path`. It is created by the first backup if its parent is there.
    pub fn new(path: PathBuf) -> Self {
        Self { path, stop_before: None }
    }
}

#[async_trait]
impl Provider for DirectoryProvider {
    fn name(&self) -> String {
        format!("directory {}", self.path.display())
    }

    async fn job_init(&self) -> Result<TargetId> {
        let path = self.path.clone();
        blocking(move || {
            let target = target::open_or_create(&path)?;
            target::check_writable(&target)?;
            identity::read_or_draw(&target)
        })
        .await
    }

    async fn job_cleanup(&self) -> Result<()> {
        Ok(())
    }

    async fn backup_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Backup>> {
        let (path, vm, point, stop) = (self.path.clone(), vm.clone(), point.clone(), self.stop_before);
        let backup =
            blocking(move || DirectoryBackup::begin(&target::open(&path)?, &vm, &point, stop)).await?;
        Ok(Box::new(backup))
    }

    async fn points(&self, vm: Option<&VmName>) -> Result<Vec<PointSummary>> {
        let (path, vm) = (self.path.clone(), vm.cloned());
        blocking(move || listing::points(&target::open(&path)?, vm.as_ref())).await
    }

    async fn restore_vm_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Restore>> {
        let (path, vm, point) = (self.path.clone(), vm.clone(), point.clone());
        let restore = blocking(move || DirectoryRestore::open(&target::open(&path)?, &vm, &point)).await?;
        Ok(Box::new(restore))
    }

    async fn verify(
        &self,
        vm: &VmName,
        point: &PointId,
        progress: Arc<dyn Progress>,
    ) -> Result<VerifyReport> {
        /// Tells the thread that reads when its caller has gone.
        struct Abandon(Arc<AtomicBool>);
        impl Drop for Abandon {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let abandon = Abandon(Arc::default());
        let verify = Verify::new(progress, Arc::clone(&abandon.0));
        let (path, vm, point) = (self.path.clone(), vm.clone(), point.clone());
        blocking(move || verify.run(&target::open(&path)?, &vm, &point)).await
    }
}
