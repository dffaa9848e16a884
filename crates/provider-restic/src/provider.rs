//! The provider itself.

use crate::{
    backup::ResticBackup,
    error::{blocking, in_one_line},
    password::PasswordSource,
    repository::Repository,
    restore::ResticRestore,
    snapshot::{self, Found},
    verify::{self, Verified},
};
use async_trait::async_trait;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use stillpoint_model::{PointId, TargetId, VmName};
use stillpoint_provider::{
    Backup, Depth, Error, ErrorKind, PointSummary, Progress, Provider, Restore, Result, VerifyReport,
};
use tokio::sync::Mutex;

/// Where a repository is and how it is opened.
#[derive(Debug, Clone)]
pub struct Settings {
    /// As restic writes it: a path, `s3:https://HOST/BUCKET[/PATH]`, `sftp:[USER@]HOST:/PATH`.
    pub repository: String,
    /// Where the password is.
    pub password: PasswordSource,
}

/// For so long a host that did not answer is not asked again: who backs up many VMs would wait for it with each.
const AGAIN: Duration = Duration::from_secs(30);

struct Unreachable {
    when: Instant,
    what: String,
    next: String,
}

/// Keeps points in a restic repository.
pub struct ResticProvider {
    settings: Settings,
    /// Opened when first needed: deriving the key from the password takes a while.
    open: Mutex<Option<Arc<Repository>>>,
    /// When its host was last found not to answer, with what was said of it.
    unreachable: Mutex<Option<Unreachable>>,
    /// What was found good already, so that points that share data are not read again for each other.
    verified: Arc<Verified>,
}

impl ResticProvider {
    /// A provider for the repository that `settings` name.
    pub fn new(settings: Settings) -> Self {
        Self { settings, open: Mutex::new(None), unreachable: Mutex::new(None), verified: Arc::default() }
    }

    /// Creates the repository. Nothing else ever does.
    ///
    /// # Errors
    /// If there is one, or something that might be the rest of one, or it cannot be written.
    pub async fn create(&self) -> Result<()> {
        let settings = self.settings.clone();
        let made =
            blocking(move || Repository::create(&settings.repository, &settings.password.read()?)).await?;
        *self.open.lock().await = Some(Arc::new(made));
        Ok(())
    }

    pub(crate) async fn repository(&self) -> Result<Arc<Repository>> {
        let mut open = self.open.lock().await;
        if let Some(repository) = open.as_ref() {
            return Ok(Arc::clone(repository));
        }
        let mut unreachable = self.unreachable.lock().await;
        if let Some(earlier) = unreachable.as_ref().filter(|earlier| earlier.when.elapsed() < AGAIN) {
            let what = format!("{} (found {} s ago)", earlier.what, earlier.when.elapsed().as_secs());
            return Err(Error::new(ErrorKind::Unreachable, what).next(earlier.next.clone()));
        }
        let settings = self.settings.clone();
        let opened =
            blocking(move || Repository::open(&settings.repository, &settings.password.read()?)).await;
        match opened {
            Ok(repository) => Ok(Arc::clone(open.insert(Arc::new(repository)))),
            Err(error) => {
                if error.kind() == ErrorKind::Unreachable {
                    let next =
                        error.what_next().unwrap_or("check that the host runs and is reached from here");
                    let (what, next) = (in_one_line(&error), next.to_owned());
                    *unreachable = Some(Unreachable { when: Instant::now(), what, next });
                }
                Err(error)
            }
        }
    }

    async fn find(&self, vm: &VmName, point: &PointId) -> Result<(Arc<Repository>, Found)> {
        let repository = self.repository().await?;
        let (opened, name) = (Arc::clone(&repository), vm.clone());
        let listing = blocking(move || snapshot::list(&opened, Some(&name))).await?;
        let found = listing.points.into_iter().find(|found| found.point_id == *point);
        let found = found.ok_or_else(|| {
            let place = repository.location();
            let mut error =
                Error::new(ErrorKind::NotFound, format!("there is no point {vm}/{point} in {place}"));
            if let Some((name, why)) = listing.damaged.first() {
                error = error.because(format!("snapshot {name} cannot be read, and might be it: {why}"));
            }
            error
        })?;
        Ok((repository, found))
    }
}

#[async_trait]
impl Provider for ResticProvider {
    fn name(&self) -> String {
        format!("restic repository {}", crate::store::shown(&self.settings.repository))
    }

    async fn job_init(&self) -> Result<TargetId> {
        let repository = self.repository().await?;
        // The first half of what tells repositories apart is enough to tell bitmaps apart.
        let id = repository.id.get(..8).unwrap_or_default().parse();
        id.map_err(|error| crate::error::damaged("the repository has no id").because(error))
    }

    async fn job_cleanup(&self) -> Result<()> {
        Ok(())
    }

    async fn backup_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Backup>> {
        Ok(Box::new(ResticBackup::begin(self.repository().await?, vm, point).await?))
    }

    async fn points(&self, vm: Option<&VmName>) -> Result<Vec<PointSummary>> {
        let (repository, vm) = (self.repository().await?, vm.cloned());
        let listing = blocking(move || snapshot::list(&repository, vm.as_ref())).await?;
        for (name, why) in &listing.damaged {
            tracing::warn!(snapshot = name, why, "a snapshot cannot be read; `stillpoint verify` tells more");
        }
        let summary = |found: Found| {
            let sequence = found.sequence();
            let stored = found.point.as_ref().map(|point| point.stored).unwrap_or_default();
            let (record, damage) = match found.point {
                Ok(point) => (Some(point.record), None),
                Err(why) => (None, Some(why)),
            };
            PointSummary { record, vm: found.vm, id: found.point_id, sequence, stored, damage }
        };
        Ok(listing.points.into_iter().map(summary).collect())
    }

    async fn restore_vm_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Restore>> {
        let (repository, found) = self.find(vm, point).await?;
        Ok(Box::new(blocking(move || ResticRestore::open(repository, &found)).await?))
    }

    async fn verify(
        &self,
        vm: &VmName,
        point: &PointId,
        progress: Arc<dyn Progress>,
    ) -> Result<VerifyReport> {
        let (repository, found) = self.find(vm, point).await?;
        verify::point(repository, found, Arc::clone(&self.verified), progress).await
    }

    async fn verify_target(&self, depth: Depth, progress: Arc<dyn Progress>) -> Result<Option<VerifyReport>> {
        let repository = self.repository().await?;
        verify::target(repository, depth, Arc::clone(&self.verified), progress).await.map(Some)
    }
}
