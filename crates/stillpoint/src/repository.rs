//! Care for targets that are repositories: `forget`, `prune`, `key`.

use crate::{
    cli,
    commands::watched,
    config::Config,
    failure::{Exit, Failure, Guest},
    progress::StepsProgress,
    provider_failure::provider_failure,
    text::{self, note, print},
};
use serde_json::json;
use std::{path::Path, sync::Arc};
use stillpoint_model::Length;
use stillpoint_provider::ErrorKind;
use stillpoint_provider_restic::{PasswordSource, Pruned, ResticProvider, Retention, Steps};

fn failed(error: &stillpoint_provider::Error) -> Failure {
    provider_failure(error, Guest::NotConcerned)
}

/// Applies the rules, VM by VM.
///
/// # Errors
/// If the target is no repository, or the repository refuses.
pub(crate) async fn forget(path: &Path, arguments: &cli::Forget) -> Result<Exit, Failure> {
    let repository = Config::read(path)?.repository(arguments.target.as_deref(), path)?;
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
