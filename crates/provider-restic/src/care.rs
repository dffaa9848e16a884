//! Care for a repository: forgetting points, making room, keys. The rules and the repacking are rustic's.

use crate::{
    blob::Id,
    error::{blocking, in_one_line, rustic, stored},
    key_file,
    lock::Lock,
    password::PasswordSource,
    provider::ResticProvider,
    repository::Repository,
    snapshot::{self, Found},
    steps::Steps,
    store::Folder,
};
use rustic_core::{KeepOptions, LimitOption, PruneOptions, repofile::SnapshotFile};
use serde::Serialize;
use std::{collections::BTreeMap, sync::Arc};
use stillpoint_model::{PointId, VmName};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Which points of a VM are kept; one that any rule keeps is kept.
#[derive(Debug, Clone, Default)]
pub struct Retention {
    /// The newest so many.
    pub last: Option<u32>,
    /// The newest of each of so many hours that have one.
    pub hourly: Option<u32>,
    /// Of days.
    pub daily: Option<u32>,
    /// Of weeks.
    pub weekly: Option<u32>,
    /// Of months.
    pub monthly: Option<u32>,
    /// Of years.
    pub yearly: Option<u32>,
    /// All that are no older than this against the newest, such as `30d`, `2y 6mo`.
    pub within: Option<String>,
}

impl Retention {
    fn options(&self) -> Result<KeepOptions> {
        let wrong = |what: String| Error::new(ErrorKind::InvalidInput, what);
        let number = |count: Option<u32>| count.map(|count| i32::try_from(count).unwrap_or(i32::MAX));
        let mut options = KeepOptions::default();
        options.keep_last = number(self.last);
        options.keep_hourly = number(self.hourly);
        options.keep_daily = number(self.daily);
        options.keep_weekly = number(self.weekly);
        options.keep_monthly = number(self.monthly);
        options.keep_yearly = number(self.yearly);
        options.keep_within = match &self.within {
            Some(text) => Some(text.parse().map_err(|_| {
                wrong(format!("{text:?} is no span of time"))
                    .next("write it like 30d or 6mo: --keep-within 30d")
            })?),
            None => None,
        };
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        if self.within.is_none() && counts.iter().flatten().sum::<u32>() == 0 {
            return Err(
                wrong("no rule keeps anything".to_owned()).next("give one that does, such as --keep-last 7")
            );
        }
        Ok(options)
    }
}

/// What a rule says of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// The VM.
    pub vm: VmName,
    /// The point.
    pub point: PointId,
    /// Whether it is kept.
    pub keep: bool,
    /// Which rules keep it.
    pub reasons: Vec<String>,
}

/// What pruning does, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Packs that are removed.
    pub removed_packs: u64,
    /// Bytes that are freed.
    pub freed_bytes: u64,
    /// Bytes that are written anew, to get rid of others beside them.
    pub repacked_bytes: u64,
    /// Bytes that are in use.
    pub used_bytes: u64,
}

/// A key of a repository: each opens it with a password of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Key {
    /// Its name, 64 hex digits.
    pub id: String,
    /// Whether the repository was opened with it.
    pub current: bool,
    /// Where, by whom and when it was made, as far as it says.
    pub made: String,
}

impl ResticProvider {
    /// Applies `retention` to the points of `vm`, or of each VM.
    ///
    /// # Errors
    /// If no rule keeps anything, a rule cannot be understood, or the repository is in use.
    pub async fn forget(
        &self,
        vm: Option<&VmName>,
        retention: &Retention,
        dry_run: bool,
    ) -> Result<Vec<Kept>> {
        let options = retention.options()?;
        let repository = self.repository().await?;
        let lock = if dry_run { None } else { Some(alone(&repository).await?) };
        let vm = vm.cloned();
        let (opened, done) = (Arc::clone(&repository), !dry_run);
        let kept = blocking(move || forget(&opened, vm.as_ref(), &options, done)).await;
        if let Some(lock) = lock {
            lock.release().await;
        }
        kept
    }

    /// Removes what no snapshot needs, and tells `steps` what it does.
    ///
    /// # Errors
    /// If the repository is in use, damaged, or refuses.
    pub async fn prune(&self, dry_run: bool, steps: Arc<dyn Steps>) -> Result<Pruned> {
        let repository = self.repository().await?;
        let lock = if dry_run { None } else { Some(alone(&repository).await?) };
        let opened = Arc::clone(&repository);
        let pruned = blocking(move || opened.watcher.hears(steps, || prune(&opened, !dry_run))).await;
        if let Some(lock) = lock {
            lock.release().await;
        }
        pruned
    }

    /// Its keys.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub async fn keys(&self) -> Result<Vec<Key>> {
        let repository = self.repository().await?;
        blocking(move || keys(&repository)).await
    }

    /// Adds a key with the password that `password` tells, and returns its name.
    ///
    /// # Errors
    /// If the password cannot be read, or the key not be written.
    pub async fn add_key(&self, password: &PasswordSource) -> Result<String> {
        let (repository, password) = (self.repository().await?, password.read()?);
        blocking(move || key_file::add(&*repository.store, &repository.rustic.key(), &password)).await
    }

    /// Removes the key whose name starts with `name`.
    ///
    /// # Errors
    /// If there is none or more than one, or it is the one that the repository was opened with.
    pub async fn remove_key(&self, name: &str) -> Result<String> {
        let all = self.keys().await?;
        let wrong = |why: &str| Err(Error::new(ErrorKind::InvalidInput, format!("key {name:?} {why}")));
        let mut matching = all.iter().filter(|key| !name.is_empty() && key.id.starts_with(name));
        let (Some(key), None) = (matching.next(), matching.next()) else {
            return wrong("is none of the repository's, or more than one of them");
        };
        if key.current {
            return wrong(
                "is the one that the repository was opened with; open it with another to remove it",
            );
        }
        let (repository, id) = (self.repository().await?, key.id.clone());
        let removed = id.clone();
        blocking(move || {
            let remove = repository.store.remove(Folder::Keys, &id).and_then(|()| repository.store.sync());
            remove.map_err(|error| stored("cannot remove the key", error))
        })
        .await?;
        Ok(removed)
    }
}

async fn alone(repository: &Arc<Repository>) -> Result<Lock> {
    let lock = Lock::take(repository, true).await?;
    stillpoint_failpoint::reached("restic-alone");
    Ok(lock)
}

fn forget(
    repository: &Repository,
    vm: Option<&VmName>,
    options: &KeepOptions,
    done: bool,
) -> Result<Vec<Kept>> {
    let mut by_vm: BTreeMap<VmName, Vec<Found>> = BTreeMap::new();
    for found in snapshot::list(repository, vm)?.points {
        by_vm.entry(found.vm.clone()).or_default().push(found);
    }
    let (mut all, mut gone) = (Vec::new(), Vec::new());
    for (vm, points) in by_vm {
        let mut snapshots = Vec::new();
        for point in &points {
            let id = parse(&point.id)?;
            let read = repository.rustic.get_file::<SnapshotFile>(&id);
            let mut snapshot = read.map_err(|error| rustic("cannot read a snapshot", &error))?;
            snapshot.id = id;
            snapshots.push(snapshot);
        }
        let newest = snapshots.iter().map(|snapshot| snapshot.time.clone()).max();
        let Some(now) = newest else { continue };
        let judged =
            options.apply(snapshots, &now).map_err(|error| rustic("the rules cannot be used", &error))?;
        for found in points {
            let id = parse(&found.id)?;
            let judgement = judged.iter().find(|judged| judged.snapshot.id == id);
            let keep = judgement.is_none_or(|judged| judged.keep);
            if !keep {
                gone.push(found.id);
            }
            let reasons = judgement.filter(|judged| judged.keep).map(|judged| judged.reasons.clone());
            all.push(Kept {
                vm: vm.clone(),
                point: found.point_id,
                keep,
                reasons: reasons.unwrap_or_default(),
            });
        }
    }
    if done {
        for id in gone {
            let removed = repository.store.remove(Folder::Snapshots, &id.to_string());
            removed.map_err(|error| stored("cannot remove a snapshot", error))?;
        }
        repository.store.sync().map_err(|error| stored("what was forgotten may come back", error))?;
    }
    Ok(all)
}

fn parse(id: &Id) -> Result<rustic_core::repofile::SnapshotId> {
    id.to_string().parse().map_err(|_| crate::error::damaged("a snapshot's name is none"))
}

fn prune(repository: &Repository, done: bool) -> Result<Pruned> {
    // Alone by the lock, there is nobody to wait for.
    let mut options = PruneOptions::default();
    options.instant_delete = true;
    options.max_unused = LimitOption::Percentage(5);
    options.keep_pack = rustic_core::jiff::Span::new();
    options.keep_delete = rustic_core::jiff::Span::new();
    let failed = |error: Box<rustic_core::RusticError>| rustic("cannot prune the repository", &error);
    let plan = repository.rustic.prune_plan(&options).map_err(failed)?;
    let stats = &plan.stats;
    let (mut used, mut freed, mut repacked) = (0u64, stats.size_unref, 0u64);
    for (_, size) in &stats.size {
        used = used.saturating_add(size.used);
        freed = freed.saturating_add(size.remove).saturating_add(size.repackrm);
        repacked = repacked.saturating_add(size.repack.saturating_sub(size.repackrm));
    }
    let pruned = Pruned {
        removed_packs: stats
            .packs
            .unused
            .saturating_add(stats.packs.repack)
            .saturating_add(stats.packs_unref),
        freed_bytes: freed,
        repacked_bytes: repacked,
        used_bytes: used,
    };
    if done {
        repository.rustic.prune(&options, plan).map_err(failed)?;
        repository.store.sync().map_err(|error| stored("pruning may not last", error))?;
    }
    Ok(pruned)
}

fn keys(repository: &Repository) -> Result<Vec<Key>> {
    /// What a key says of itself, in the clear.
    #[derive(serde::Deserialize)]
    struct KeyFile {
        hostname: Option<String>,
        username: Option<String>,
        created: Option<String>,
    }
    let current = Some(repository.key_name.clone());
    let mut all = Vec::new();
    for (id, _) in
        repository.store.list(Folder::Keys).map_err(|error| stored("cannot list the keys", error))?
    {
        let made = match repository.store.read(Folder::Keys, &id) {
            Ok(content) => match serde_json::from_slice::<KeyFile>(&content) {
                Ok(file) => [file.username, file.hostname, file.created]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join(" "),
                Err(_) => "damaged".to_owned(),
            },
            Err(error) => in_one_line(&error),
        };
        all.push(Key { current: current.as_ref() == Some(&id), id, made: made.escape_debug().to_string() });
    }
    all.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(all)
}
