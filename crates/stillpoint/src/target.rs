//! Targets as a person meets them: made, remembered, and told apart.

use crate::{
    cli,
    config::Config,
    failure::{Exit, Failure, Guest},
    places::Places,
    provider_failure::provider_failure,
    text::{note, print},
};
use std::path::Path;
use stillpoint_model::TargetId;
use stillpoint_provider::Provider;
use stillpoint_provider_directory::{Before, DirectoryProvider};
use stillpoint_snapshot_access::Disk;

/// Remembers that a job found `target` in its place, and returns what there is to be warned of: that another was here before, or that
/// `disks` have bitmaps of one that this host has never seen.
pub(crate) fn seen(
    places: &Places,
    provider: &dyn Provider,
    directory: Option<&DirectoryProvider>,
    target: &TargetId,
    disks: &[Disk],
) -> Vec<String> {
    let mut warnings = Vec::new();
    let remembered = match directory {
        None => places.remember_name(&provider.name(), target),
        Some(directory) => {
            let before = places.before(directory.path());
            warnings.extend(is_another(places, directory, &before, target, disks));
            places.remember_directory(directory.path(), target)
        }
    };
    if let Err(error) = remembered {
        warnings.push(format!(
            "this host cannot remember that target {target} is in {}, and could take the place for a new one when it is not mounted: {error}",
            provider.name()
        ));
    }
    warnings
}

/// What is to be said of a target that was not seen in this directory before.
fn is_another(
    places: &Places,
    directory: &DirectoryProvider,
    before: &Before,
    target: &TargetId,
    disks: &[Disk],
) -> Option<String> {
    let Before::Targets(known) = before else { return None };
    if known.contains(target) {
        return None;
    }
    let path = directory.path().display();
    let carries = |wanted: &dyn Fn(&TargetId) -> bool| {
        let of = |disk: &Disk| Some((disk.name.clone(), disk.targets().find(|id| wanted(id))?.clone()));
        disks.iter().find_map(of)
    };
    if let Some(other) = known.first() {
        let bitmap = match carries(&|id| known.contains(id)) {
            Some((disk, other)) => format!(" (disk {disk} has a bitmap of target {other})"),
            None => String::new(),
        };
        return Some(format!(
            "{path} is target {target} for the first time, and was target {other} before{bitmap}; if that one should be here, mount it"
        ));
    }
    let (disk, other) = carries(&|id| id != target && !places.knows(id))?;
    Some(format!(
        "{path} is target {target} for the first time, but disk {disk} has a bitmap of target {other}, which this host has not seen; if \
         that one should be here, mount it"
    ))
}

/// `target init`.
///
/// # Errors
/// If it cannot be made, or something else is in its place.
pub(crate) async fn init(path: &Path, name: Option<&str>, to: Option<&Path>) -> Result<Exit, Failure> {
    let failed = |error: stillpoint_provider::Error| provider_failure(&error, Guest::NotConcerned);
    let config = Config::read(path)?;
    let place = cli::Where { target: name.map(str::to_owned), to: to.map(Path::to_owned) };
    let provider = config.provider(&place, path)?;
    if let Some(directory) = config.directory(&place, path)? {
        let (target, new) = directory.create().await.map_err(failed)?;
        print(match new {
            true => format!("{} is target {target} now", provider.name()),
            false => format!("{} is target {target} already; nothing was changed", provider.name()),
        });
        Places::of_this_host().remember_directory(directory.path(), &target).map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("the target is there, but this host cannot remember it: {error}"),
            )
        })?;
        return Ok(Exit::Done);
    }
    let Ok(repository) = config.repository(name, path) else {
        note(format!("{} makes its target itself, with the first backup", provider.name()));
        return Ok(Exit::Done);
    };
    repository.create().await.map_err(failed)?;
    print(format!(
        "{} is created; keep its password in a second place: without it nothing can be restored",
        provider.name()
    ));
    Ok(Exit::Done)
}
