//! Care for what targets keep: `forget`, `prune`, `key`.

use crate::{
    cli,
    commands::watched,
    config::Config,
    failure::{Exit, Failure, Guest},
    progress::{BytesProgress, StepsProgress},
    provider_failure::provider_failure,
    text::{self, note, print},
};
use serde_json::json;
use std::{path::Path, sync::Arc};
use stillpoint_model::Length;
use stillpoint_provider::{Error, ErrorKind, Provider as _};
use stillpoint_provider_directory::{DirectoryProvider, Dropping, Judged};
use stillpoint_provider_restic::{PasswordSource, Pruned, ResticProvider, Retention, Steps};

fn failed(error: &Error) -> Failure {
    provider_failure(error, Guest::NotConcerned)
}

/// Applies the rules, VM by VM.
///
/// # Errors
/// If the target is no repository, or the repository refuses.
pub(crate) async fn forget(path: &Path, arguments: &cli::Forget) -> Result<Exit, Failure> {
    let config = Config::read(path)?;
    let directory = config.directory(&arguments.place, path)?;
    if let Some(which) = arguments.damaged {
        return damaged(&config, path, arguments, which, directory).await;
    }
    if let Some(directory) = directory {
        let what = format!(
            "{} keeps points that are increments to each other, and forgets none by rules",
            directory.name()
        );
        return Err(Failure::usage(what).next("to drop damaged points: stillpoint forget --damaged{target}"));
    }
    let repository = config.repository(arguments.place.target.as_deref(), path)?;
    let retention = Retention {
        last: arguments.keep_last,
        hourly: arguments.keep_hourly,
        daily: arguments.keep_daily,
        weekly: arguments.keep_weekly,
        monthly: arguments.keep_monthly,
        yearly: arguments.keep_yearly,
        within: arguments.keep_within.clone(),
    };
    let kept = repository.forget(arguments.vm.as_ref(), &retention, arguments.dry_run).await;
    let kept = kept.map_err(|error| failed(&error))?;
    let forgotten = kept.iter().filter(|point| !point.keep).count();
    let pruned = match arguments.prune {
        true => Some(pruned(&repository, false).await?),
        false => None,
    };
    if arguments.json {
        print(
            json!({"points": kept, "forgotten": forgotten, "dry_run": arguments.dry_run, "pruned": pruned}),
        );
        return Ok(Exit::Done);
    }
    for point in &kept {
        let state = match (point.keep, arguments.dry_run) {
            (true, _) => format!("kept: {}", point.reasons.join(", ")),
            (false, true) => "would be forgotten".to_owned(),
            (false, false) => "forgotten".to_owned(),
        };
        print(format!("{}/{}  {state}", point.vm, point.point));
    }
    let left = kept.len().saturating_sub(forgotten);
    let would = if arguments.dry_run { "would be " } else { "" };
    print(format!("{forgotten} points {would}forgotten, {left} kept"));
    match pruned {
        Some(pruned) => tell(&pruned, false),
        None if forgotten > 0 && !arguments.dry_run => note("to make room: stillpoint prune"),
        None => {}
    }
    Ok(Exit::Done)
}

/// Drops the damaged points of a directory.
async fn damaged(
    config: &Config,
    path: &Path,
    arguments: &cli::Forget,
    which: cli::Damaged,
    directory: Option<DirectoryProvider>,
) -> Result<Exit, Failure> {
    let Some(directory) = directory else {
        let name = config.provider(&arguments.place, path)?.name();
        let what = format!("{name} is no directory, and the damaged points of others are not dropped here");
        return Err(failed(&Error::new(ErrorKind::Unsupported, what)).next(
            "in a repository: `restic snapshots --tag point=ID` finds the snapshot of a point, and `restic forget` drops it",
        ));
    };
    let which = match which {
        cli::Damaged::BeyondUse => Dropping::BeyondUse,
        cli::Damaged::Any => Dropping::Any,
    };
    let progress = Arc::new(BytesProgress::start(watched(), directory.name()));
    let judged = directory
        .drop_damaged(arguments.vm.as_ref(), which, arguments.dry_run, Arc::clone(&progress) as _)
        .await;
    progress.finish();
    let judged = judged.map_err(|error| failed(&error))?;
    let dropped = judged.iter().filter(|point| !point.keep).count();
    if arguments.json {
        print(json!({"points": judged, "forgotten": dropped, "dry_run": arguments.dry_run, "pruned": null}));
        return Ok(Exit::Done);
    }
    for point in &judged {
        tell_judged(point, arguments.dry_run);
    }
    let would = if arguments.dry_run { "would be " } else { "" };
    let good = judged.iter().filter(|point| point.damage.is_none()).count();
    let left = judged.len().saturating_sub(dropped);
    print(format!("{dropped} points {would}dropped, {left} kept, {good} of them good"));
    Ok(Exit::Done)
}

fn tell_judged(point: &Judged, dry_run: bool) {
    let state = match (point.keep, dry_run, &point.damage) {
        (true, _, None) => "good",
        (true, _, Some(_)) => "damaged, kept",
        (false, true, _) => "damaged, would be dropped",
        (false, false, _) => "damaged, dropped",
    };
    let why = point.kept_because.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    print(format!("{}/{}  {state}{why}", point.vm, point.point));
    let Some(damage) = &point.damage else { return };
    print(format!("  {damage}"));
    if !point.restorable.is_empty() {
        let disks: Vec<_> = point.restorable.iter().map(|disk| format!("--disk {disk}")).collect();
        print(format!("  can be restored all the same: {}", disks.join(" ")));
    }
    if !point.keep && !point.dependents.is_empty() {
        let dependents: Vec<_> = point.dependents.iter().map(|id| format!("{}/{id}", point.vm)).collect();
        print(format!("  increments to it: {}", dependents.join(", ")));
    }
}

/// Makes room.
///
/// # Errors
/// If the target is no repository, or the repository refuses.
pub(crate) async fn prune(path: &Path, arguments: &cli::Prune) -> Result<Exit, Failure> {
    let repository = Config::read(path)?.repository(arguments.target.as_deref(), path)?;
    let pruned = pruned(&repository, arguments.dry_run).await?;
    if arguments.json {
        print(json!({"dry_run": arguments.dry_run, "pruned": pruned}));
    } else {
        tell(&pruned, arguments.dry_run);
    }
    Ok(Exit::Done)
}

async fn pruned(repository: &ResticProvider, dry_run: bool) -> Result<Pruned, Failure> {
    let progress = Arc::new(StepsProgress::start(watched(), "prune"));
    let pruned = repository.prune(dry_run, Arc::clone(&progress) as Arc<dyn Steps>).await;
    progress.finish();
    pruned.map_err(|error| failed(&error))
}

fn tell(pruned: &Pruned, dry_run: bool) {
    let would = if dry_run { "would be " } else { "" };
    let bytes = |bytes| text::bytes(Length::new(bytes));
    print(format!(
        "{} {would}freed in {} packs, {} {would}written anew; {} are in use",
        bytes(pruned.freed_bytes),
        pruned.removed_packs,
        bytes(pruned.repacked_bytes),
        bytes(pruned.used_bytes)
    ));
}

/// Lists, adds or removes a key.
///
/// # Errors
/// If the target is no repository, or the repository refuses.
pub(crate) async fn key(path: &Path, command: &cli::Key) -> Result<Exit, Failure> {
    let open = |target: &Option<String>| -> Result<ResticProvider, Failure> {
        Config::read(path)?.repository(target.as_deref(), path)
    };
    match command {
        cli::Key::List { target, json } => {
            let keys = open(target)?.keys().await.map_err(|error| failed(&error))?;
            if *json {
                print(serde_json::to_string_pretty(&keys).unwrap_or_default());
                return Ok(Exit::Done);
            }
            for key in keys {
                let current = if key.current { "*" } else { " " };
                print(format!("{current} {}  {}", key.id.get(..12).unwrap_or(&key.id), key.made));
            }
        }
        cli::Key::Add { target, new_password_file } => {
            let password = PasswordSource::File(new_password_file.clone());
            let id = open(target)?.add_key(&password).await.map_err(|error| failed(&error))?;
            print(format!("key {} is added", id.get(..12).unwrap_or(&id)));
        }
        cli::Key::Remove { target, key } => {
            let id = open(target)?.remove_key(key).await.map_err(|error| match error.kind() {
                ErrorKind::InvalidInput => {
                    failed(&error).next("stillpoint key list{target}, to see which there are")
                }
                _ => failed(&error),
            })?;
            print(format!("key {} is removed", id.get(..12).unwrap_or(&id)));
        }
    }
    Ok(Exit::Done)
}
