//! The provider itself.

use crate::{
    backup::{DirectoryBackup, Step},
    damage::{self, Dropping},
    error::{blocking, from_image},
    listing,
    restore::DirectoryRestore,
    state::{Before, Site, TargetState},
    target,
    verify::Verify,
};
use async_trait::async_trait;
use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use stillpoint_image::Space;
use stillpoint_model::{PointId, TargetId, VmName};
use stillpoint_provider::{
    Backup, Depth, Error, ErrorKind, Finding, PointSummary, Progress, Provider, Restore, Result, VerifyReport,
};

/// Keeps points as plain images in a directory.
#[derive(Debug, Clone)]
pub struct DirectoryProvider {
    path: PathBuf,
    before: Before,
    /// The target that the job under way began with.
    job: Arc<Mutex<Option<TargetId>>>,
    /// Where a test wants the next commit to end as if by a crash.
    pub(crate) stop_before: Option<Step>,
}

/// A target's directory, looked at.
#[derive(Debug)]
pub struct Examined {
    /// What there is.
    pub state: TargetState,
    /// Why it would not be used for a backup, if so.
    pub obstacle: Option<Error>,
    /// What its file system has left; of the parent, if the directory is not there yet. `None` if it does not say.
    pub space: Option<Space>,
}

/// Tells the thread that reads when its caller has gone.
struct Abandon(Arc<AtomicBool>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl DirectoryProvider {
    /// A provider for the target directory `path`. The first backup makes a target there if the directory is empty, or is missing
    /// and its parent is there.
    pub fn new(path: PathBuf) -> Self {
        Self { path, before: Before::default(), job: Arc::default(), stop_before: None }
    }

    /// The same with what is known of the path: where a target was before, none is made in passing.
    #[must_use]
    pub fn known(mut self, before: Before) -> Self {
        self.before = before;
        self
    }

    /// Where it is.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Makes a target on purpose: in an empty or new directory, whatever was there before, or around points that have lost theirs.
    /// One that is there stays as it is. Tells whether it is new.
    ///
    /// # Errors
    /// If there are other things, or it cannot be written.
    pub async fn create(&self) -> Result<(TargetId, bool)> {
        let path = self.path.clone();
        blocking(move || Site::create(&path)).await
    }

    /// Looks whether a backup could be kept there. Makes nothing but a file that it removes at once.
    ///
    /// # Errors
    /// If the path cannot be looked at.
    pub async fn examine(&self) -> Result<Examined> {
        let (path, before) = (self.path.clone(), self.before.clone());
        blocking(move || {
            let site = Site::look(&path, &before)?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let near = match &site.state {
                TargetState::New => parent.unwrap_or(std::path::Path::new(".")),
                _ => &path,
            };
            let directory = stillpoint_image::Directory::open(near).map_err(from_image)?;
            let obstacle = site.obstacle(&path, &before).or_else(|| target::check_writable(&directory).err());
            Ok(Examined { obstacle, state: site.state, space: directory.space().ok() })
        })
        .await
    }

    /// Finds the points that are damaged, of `vm` or of each, and drops those that `which` says (or only tells, if `dry_run`). All that
    /// is stored is read, and nothing is dropped that a good point needs, nor what cannot be read for another reason than damage.
    ///
    /// # Errors
    /// If a VM is locked or something cannot be removed; what was dropped before that stays dropped.
    pub async fn drop_damaged(
        &self,
        vm: Option<&VmName>,
        which: Dropping,
        dry_run: bool,
        progress: Arc<dyn Progress>,
    ) -> Result<Vec<damage::Judged>> {
        let abandon = Abandon(Arc::default());
        let (path, before, vm) = (self.path.clone(), self.before.clone(), vm.cloned());
        let abandoned = Arc::clone(&abandon.0);
        blocking(move || {
            let (target, _) = Site::write(&path, &before)?;
            damage::drop_damaged(&target, vm.as_ref(), which, dry_run, progress, abandoned)
        })
        .await
    }

    fn job(&self) -> std::sync::MutexGuard<'_, Option<TargetId>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Provider for DirectoryProvider {
    fn name(&self) -> String {
        format!("directory {}", self.path.display())
    }

    async fn job_init(&self) -> Result<TargetId> {
        let (path, before) = (self.path.clone(), self.before.clone());
        let id = blocking(move || Ok(Site::write_or_make(&path, &before)?.1)).await?;
        *self.job() = Some(id.clone());
        Ok(id)
    }

    async fn job_cleanup(&self) -> Result<()> {
        *self.job() = None;
        Ok(())
    }

    async fn backup_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Backup>> {
        let (path, before, job) = (self.path.clone(), self.before.clone(), self.job().clone());
        let (vm, point, stop) = (vm.clone(), point.clone(), self.stop_before);
        let backup = blocking(move || {
            let (target, id) = Site::write(&path, &before)?;
            if job.as_ref().is_some_and(|job| *job != id) {
                let what = format!("{} became target {id} while the backup began", path.display());
                return Err(Error::new(ErrorKind::TargetForeign, what));
            }
            DirectoryBackup::begin(&target, &vm, &point, stop)
        });
        Ok(Box::new(backup.await?))
    }

    async fn points(&self, vm: Option<&VmName>) -> Result<Vec<PointSummary>> {
        let (path, before, vm) = (self.path.clone(), self.before.clone(), vm.cloned());
        blocking(move || listing::points(&Site::read(&path, &before)?, vm.as_ref())).await
    }

    async fn restore_vm_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Restore>> {
        let (path, before) = (self.path.clone(), self.before.clone());
        let (vm, point) = (vm.clone(), point.clone());
        let restore = blocking(move || DirectoryRestore::open(&Site::read(&path, &before)?, &vm, &point));
        Ok(Box::new(restore.await?))
    }

    async fn verify(
        &self,
        vm: &VmName,
        point: &PointId,
        progress: Arc<dyn Progress>,
    ) -> Result<VerifyReport> {
        let abandon = Abandon(Arc::default());
        let verify = Verify::new(progress, Arc::clone(&abandon.0));
        let (path, before) = (self.path.clone(), self.before.clone());
        let (vm, point) = (vm.clone(), point.clone());
        blocking(move || verify.run(&Site::read(&path, &before)?, &vm, &point)).await
    }

    async fn verify_target(&self, depth: Depth, _: Arc<dyn Progress>) -> Result<Option<VerifyReport>> {
        // What points share here is only the target's name. It is told of where it is wrong, and is no reason to say anything else.
        let (path, before) = (self.path.clone(), self.before.clone());
        let state = blocking(move || Ok(Site::look(&path, &before)?.state)).await?;
        Ok(match state {
            TargetState::NoTarget { what, points: true } if depth == Depth::Full => {
                let finding = Finding { disk: None, offset: None, what };
                Some(VerifyReport { findings: vec![finding], ..VerifyReport::default() })
            }
            _ => None,
        })
    }
}
