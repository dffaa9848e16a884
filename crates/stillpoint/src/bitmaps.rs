//! `bitmaps list` and `bitmaps remove`: what Stillpoint keeps in a VM's images between two points.

use crate::{
    cli::{self, Where},
    config::{Config, Vm},
    failure::{Exit, Failure, Guest},
    places::Places,
    provider_failure::provider_failure,
    reach::ReachedVm,
    text::{self, note, print},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use stillpoint_model::{Length, TargetId};
use stillpoint_provider::Provider;
use stillpoint_provider_directory::{DirectoryProvider, TargetState};
use stillpoint_snapshot_access::PointBitmap;

/// `bitmaps`.
pub(crate) async fn run(path: &Path, command: &cli::Bitmaps) -> Result<Exit, Failure> {
    match command {
        cli::Bitmaps::List { of, json } => list(path, of, *json).await,
        cli::Bitmaps::Remove { of, place, gone, all: _ } => {
            let which = match (place.to.is_some() || place.target.is_some(), gone) {
                (true, _) => Which::Of(place),
                (false, true) => Which::Gone,
                (false, false) => Which::All,
            };
            remove(path, of, &which).await
        }
    }
}

/// Which bitmaps are to be removed.
enum Which<'a> {
    Of(&'a Where),
    Gone,
    All,
}

/// The VM that is meant, held.
async fn reach(
    config: &Config,
    path: &Path,
    of: &cli::OneVm,
    place: Option<&Where>,
) -> Result<ReachedVm, Failure> {
    let vm = match (&of.vm, &of.qmp) {
        (_, Some(socket)) => Vm::at(socket.clone(), None),
        (Some(name), None) => config.vm(name, path)?.clone(),
        (None, None) => return Err(Failure::usage("name a VM, or its socket with --qmp")),
    };
    // A VM that is off and has no `disks` is known by its last point, if a target is named.
    let provider = place.map(|place| config.provider(place, path)).transpose()?;
    ReachedVm::reach(of.vm.as_ref(), &vm, provider.as_deref()).await
}

async fn all(vm: &ReachedVm) -> Result<Vec<PointBitmap>, Failure> {
    PointBitmap::all(&vm.qmp).await.map_err(|error| {
        Failure::because(Exit::Failed, "cannot look at the bitmaps", &error).guest(Guest::Untouched)
    })
}

async fn list(path: &Path, of: &cli::OneVm, json: bool) -> Result<Exit, Failure> {
    let config = Config::read(path)?;
    let vm = reach(&config, path, of, None).await?;
    let found = all(&vm).await;
    vm.release().await;
    let found = found?;
    let targets = Targets::look(&config, path).await;
    let mut states = BTreeMap::new();
    for bitmap in &found {
        if !states.contains_key(&bitmap.target) {
            states.insert(bitmap.target.clone(), targets.state(&bitmap.target).await);
        }
    }
    let state = |bitmap: &PointBitmap| states.get(&bitmap.target).cloned().unwrap_or(State::Unknown);
    if json {
        let one = |bitmap: &PointBitmap| {
            let state = state(bitmap);
            json!({
                "disk": bitmap.disk,
                "node": bitmap.node,
                "target": bitmap.target,
                "target_name": state.name(),
                "target_state": state.word(),
                "point": bitmap.point,
                "dirty_bytes": bitmap.dirty,
                "granularity": bitmap.granularity,
                "persistent": bitmap.persistent,
                "inconsistent": bitmap.inconsistent,
            })
        };
        print(serde_json::to_string_pretty(&found.iter().map(one).collect::<Vec<_>>()).unwrap_or_default());
        return Ok(Exit::Done);
    }
    if found.is_empty() {
        note("no bitmap of Stillpoint in this VM; the next point in each target reads its disks in full");
        return Ok(Exit::Done);
    }
    let width = found.iter().map(|bitmap| bitmap.disk.as_str().len()).max().unwrap_or(0).max(4);
    print(format!(
        "{:width$}  {:8}  {:25}  {:>9}  {:>11}  {:10}  {}",
        "disk", "target", "point", "changed", "granularity", "kept in", "the target"
    ));
    for bitmap in &found {
        let kept = if bitmap.persistent { "the image" } else { "memory" };
        let broken = if bitmap.inconsistent { "; inconsistent, so of no use" } else { "" };
        let below = if bitmap.read_only { "; on an image below the disk's" } else { "" };
        print(format!(
            "{:width$}  {:8}  {:25}  {:>9}  {:>11}  {kept:10}  {}{broken}{below}",
            bitmap.disk,
            bitmap.target,
            bitmap.point,
            text::bytes(bitmap.dirty),
            text::bytes(bitmap.granularity),
            state(bitmap).describe(),
        ));
    }
    Ok(Exit::Done)
}

async fn remove(path: &Path, of: &cli::OneVm, which: &Which<'_>) -> Result<Exit, Failure> {
    let config = Config::read(path)?;
    let wanted = match which {
        Which::Of(place) => Some(ids_of(&config, path, place).await?),
        Which::Gone | Which::All => None,
    };
    let targets = match which {
        Which::Gone => Some(Targets::look(&config, path).await),
        Which::Of(_) | Which::All => None,
    };
    let place = match which {
        Which::Of(place) => Some(*place),
        Which::Gone | Which::All => None,
    };
    let vm = reach(&config, path, of, place).await?;
    let removed = remove_from(&vm, wanted.as_deref(), targets.as_ref()).await;
    vm.release().await;
    removed
}

async fn remove_from(
    vm: &ReachedVm,
    wanted: Option<&[TargetId]>,
    gone: Option<&Targets>,
) -> Result<Exit, Failure> {
    let (mut removed, mut kept, mut unsure) = (0usize, Vec::new(), 0usize);
    for bitmap in all(vm).await? {
        if wanted.is_some_and(|wanted| !wanted.contains(&bitmap.target)) {
            continue;
        }
        if let Some(targets) = gone {
            match targets.state(&bitmap.target).await {
                State::Gone(_) => {}
                State::Unknown => {
                    unsure = unsure.saturating_add(1);
                    continue;
                }
                State::Reachable(_) | State::Unreachable(_) => continue,
            }
        }
        match bitmap.remove(&vm.qmp).await {
            Ok(()) => removed = removed.saturating_add(1),
            Err(error) if bitmap.read_only => {
                tracing::debug!(error = crate::failure::chain(&error));
                kept.push(bitmap);
            }
            Err(error) => {
                let what = format!("{removed} bitmaps are removed, and then");
                return Err(Failure::because(Exit::Failed, what, &error).guest(Guest::Untouched));
            }
        }
    }
    print(format!("{} removed", count(removed)));
    if removed > 0 {
        note("the next point in the targets that they were for reads those disks in full");
    }
    if unsure > 0 {
        return Err(Failure::new(
            Exit::Failed,
            format!(
                "{} kept: a target of the configuration cannot be reached, and they may be for it",
                count(unsure)
            ),
        )
        .guest(Guest::Untouched)
        .next("stillpoint bitmaps list, then remove those of a target with --target or --to, or --all"));
    }
    let Some(first) = kept.first() else { return Ok(Exit::Done) };
    let what = format!(
        "{} stayed on images below the disks' own, such as node {} of disk {}: QEMU has those for reading only",
        count(kept.len()),
        first.node,
        first.disk
    );
    Err(Failure::new(Exit::Failed, what).guest(Guest::Untouched).next(
        "commit or flatten what is above them, then type the same again; or, while the VM is off, for each: qemu-img bitmap --remove IMAGE NAME",
    ))
}

fn count(bitmaps: usize) -> String {
    if bitmaps == 1 { "1 bitmap".into() } else { format!("{bitmaps} bitmaps") }
}

/// The identities of the target that a person names: the one that is there, or those that were.
async fn ids_of(config: &Config, path: &Path, place: &Where) -> Result<Vec<TargetId>, Failure> {
    let provider = config.provider(place, path)?;
    let directory = config.directory(place, path)?;
    let found = id_of(provider.as_ref(), directory.as_ref()).await;
    provider.close().await;
    match (found, directory) {
        (Ok(id), _) => Ok(vec![id]),
        (Err(failure), Some(directory)) => match Places::of_this_host().before(directory.path()) {
            stillpoint_provider_directory::Before::Targets(ids) if !ids.is_empty() => Ok(ids),
            _ => Err(failure),
        },
        (Err(failure), None) => Err(failure),
    }
}

async fn id_of(provider: &dyn Provider, directory: Option<&DirectoryProvider>) -> Result<TargetId, Failure> {
    let failed = |error| provider_failure(&error, Guest::Untouched);
    if let Some(directory) = directory {
        return match directory.examine().await.map_err(failed)?.state {
            TargetState::Target(id) => Ok(id),
            _ => Err(Failure::new(Exit::Failed, format!("{} is no target", provider.name()))
                .guest(Guest::Untouched)
                .next("stillpoint bitmaps list, to see which targets there are bitmaps of")),
        };
    }
    let id = provider.job_init().await.map_err(failed);
    if let Err(error) = provider.job_cleanup().await {
        tracing::debug!(error = crate::failure::chain(&error), "the provider's clean-up failed");
    }
    id
}

/// Where a bitmap's target is.
#[derive(Debug, Clone)]
enum State {
    /// It is in this place.
    Reachable(String),
    /// It was in this place, which is of the configuration and cannot be looked at now.
    Unreachable(String),
    /// It is in none of the places that the configuration names or this host remembers; the last of those, if any.
    Gone(Option<String>),
    /// Nothing tells, since a target of the configuration cannot be looked at.
    Unknown,
}

impl State {
    fn word(&self) -> &'static str {
        match self {
            Self::Reachable(_) => "reachable",
            Self::Unreachable(_) => "unreachable",
            Self::Gone(_) => "gone",
            Self::Unknown => "unknown",
        }
    }

    fn name(&self) -> Option<&str> {
        match self {
            Self::Reachable(name) | Self::Unreachable(name) => Some(name),
            Self::Gone(name) => name.as_deref(),
            Self::Unknown => None,
        }
    }

    fn describe(&self) -> String {
        match (self, self.name()) {
            (Self::Reachable(_), Some(name)) => name.to_owned(),
            (Self::Unreachable(_), Some(name)) => format!("{name}, which cannot be reached now"),
            (Self::Gone(_), Some(name)) => format!("gone; it was in {name}"),
            (Self::Gone(_), None) => "gone, or never seen from this host".to_owned(),
            _ => "not known: a target of the configuration cannot be reached".to_owned(),
        }
    }
}

/// The targets of the configuration and of this host's memory.
struct Targets {
    there: BTreeMap<TargetId, String>,
    /// What providers call targets that cannot be looked at.
    unreachable: Vec<String>,
}

impl Targets {
    async fn look(config: &Config, path: &Path) -> Self {
        let mut targets = Self { there: BTreeMap::new(), unreachable: Vec::new() };
        for name in config.target.keys() {
            let place = Where { target: Some(name.clone()), to: None };
            let Ok(provider) = config.provider(&place, path) else {
                targets.unreachable.push(name.clone());
                continue;
            };
            let directory = config.directory(&place, path).ok().flatten();
            match id_of(provider.as_ref(), directory.as_ref()).await {
                Ok(id) => {
                    targets.there.insert(id, format!("{name}, {}", provider.name()));
                }
                Err(_) => targets.unreachable.push(provider.name()),
            }
            provider.close().await;
        }
        targets
    }

    async fn state(&self, target: &TargetId) -> State {
        if let Some(name) = self.there.get(target) {
            return State::Reachable(name.clone());
        }
        let places = Places::of_this_host().of(target);
        for place in &places {
            let directory = DirectoryProvider::new(PathBuf::from(place));
            let found = directory.examine().await.ok().map(|examined| examined.state);
            if found == Some(TargetState::Target(target.clone())) {
                return State::Reachable(place.clone());
            }
        }
        let named = |place: &&String| {
            self.unreachable.iter().any(|name| name == *place || *name == format!("directory {place}"))
        };
        match places.iter().find(named) {
            Some(place) => State::Unreachable(place.clone()),
            None if self.unreachable.is_empty() || !places.is_empty() => {
                State::Gone(places.into_iter().next())
            }
            None => State::Unknown,
        }
    }
}

/// More bitmaps on a disk than this are told of: each takes memory of QEMU, and time when the image is opened.
const MOST_TARGETS: usize = 8;

/// What is to be said of a disk with bitmaps of many targets.
pub(crate) fn too_many<'a>(disk: &str, targets: impl Iterator<Item = &'a TargetId>) -> Option<String> {
    let targets: std::collections::BTreeSet<_> = targets.collect();
    (targets.len() > MOST_TARGETS).then(|| {
        format!(
            "disk {disk} has bitmaps of {} targets; each takes memory and time. To drop those of targets that are gone: stillpoint bitmaps remove --gone",
            targets.len()
        )
    })
}

/// A line for `doctor` on the bitmaps of a VM, if it has any.
pub(crate) fn summary(found: &[PointBitmap]) -> Option<String> {
    let oldest = found.iter().map(|bitmap| &bitmap.point).min()?;
    let targets: std::collections::BTreeSet<_> = found.iter().map(|bitmap| &bitmap.target).collect();
    let dirty: Length = found.iter().map(|bitmap| bitmap.dirty).sum();
    let persistent = found.iter().filter(|bitmap| bitmap.persistent).count();
    let day = oldest.as_str().get(..8).unwrap_or_default();
    let day =
        jiff::civil::Date::strptime("%Y%m%d", day).map_or_else(|_| day.to_owned(), |day| day.to_string());
    Some(format!(
        "{} of {} target{} ({persistent} kept in images), the oldest of {day}, marking {} as changed; while there are any, \
         internal snapshots cannot be gone back to (stillpoint bitmaps remove)",
        count(found.len()),
        targets.len(),
        if targets.len() == 1 { "" } else { "s" },
        text::bytes(dirty)
    ))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn many_targets_on_a_disk_are_told_of() {
        let ids: Vec<TargetId> = (0..9u32).map(TargetId::new).collect();
        assert!(too_many("vda", ids.iter().take(8)).is_none());
        assert!(too_many("vda", ids.iter().chain(&ids)).unwrap().contains("9 targets"));
        assert!(too_many("vda", std::iter::repeat_n(&ids[0], 20)).is_none(), "one target is one");
    }
}
