//! The targets: would a backup be kept there, and can what is there be restored?

use super::Report;
use crate::{
    cli,
    config::Config,
    failure::Guest,
    provider_failure::{TypedTarget, provider_failure},
    text::{self, print},
};
use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};
use stillpoint_image::Space;
use stillpoint_model::Length;
use stillpoint_provider::{PointSummary, Provider};
use stillpoint_provider_directory::{DirectoryProvider, TargetState};

/// With less, a target is as good as full: not even what describes a point is sure to fit.
const LEAST: Length = Length::new(64 << 20);

pub(super) async fn look(config: &Config, path: &Path, arguments: &cli::Doctor, report: &mut Report) {
    let named: Vec<_> = if arguments.place.to.is_some() || arguments.place.target.is_some() {
        vec![arguments.place.clone()]
    } else {
        config.target.keys().map(|name| cli::Where { target: Some(name.clone()), to: None }).collect()
    };
    for place in named {
        let opened = config
            .provider(&place, path)
            .and_then(|provider| Ok((provider, config.directory(&place, path)?)));
        let (provider, directory) = match opened {
            Ok(opened) => opened,
            Err(failure) => {
                report.failure(&failure);
                continue;
            }
        };
        print(format!("target {}", provider.name()));
        let typed = TypedTarget::of(&place);
        let readable = match &directory {
            Some(directory) => look_at_directory(directory, &typed, report).await,
            None => look_at_job(provider.as_ref(), &typed, report).await,
        };
        if readable {
            look_at_points(provider.as_ref(), &typed, directory.is_some(), report).await;
        }
        provider.close().await;
    }
}

/// Whether a backup would be kept in it. `false` if there is nothing to read.
async fn look_at_directory(directory: &DirectoryProvider, typed: &TypedTarget, report: &mut Report) -> bool {
    let examined = match directory.examine().await {
        Ok(examined) => examined,
        Err(error) => {
            report.failure(&provider_failure(&error, Guest::NotConcerned).at(typed));
            return false;
        }
    };
    if let Some(obstacle) = &examined.obstacle {
        report.failure(&provider_failure(obstacle, Guest::NotConcerned).at(typed));
    }
    match &examined.state {
        TargetState::Target(id) if examined.obstacle.is_none() => {
            report.good(format!("it is target {id}, and takes files"));
        }
        TargetState::New | TargetState::Empty if examined.obstacle.is_none() => report.good(format!(
            "there is no target yet: the first backup makes one here, on the file system that is mounted at {}; if another belongs \
             here, mount it first",
            mount_of(directory.path()).display()
        )),
        _ => {}
    }
    if let Some(space) = examined.space {
        look_at_space(space, report);
    }
    matches!(examined.state, TargetState::Target(_) | TargetState::NoTarget { points: true, .. })
}

fn look_at_space(space: Space, report: &mut Report) {
    let free = text::bytes(space.free);
    if space.free < LEAST {
        report.bad(format!("only {free} free"), Some("make room in the target"));
    } else if space.files == Some(0) {
        report.bad(format!("{free} free, but no file can be made: the file system has no inode left"), None);
    } else {
        report.good(format!("{free} free"));
    }
}

/// The mount point that `path`, or what will hold it, is on.
fn mount_of(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut there = absolute.ancestors().filter_map(|path| {
        let path = std::fs::canonicalize(path).ok()?;
        Some((std::fs::metadata(&path).ok()?.dev(), path))
    });
    let Some((device, mut mount)) = there.next() else { return absolute };
    for parent in mount.clone().ancestors() {
        match std::fs::metadata(parent) {
            Ok(metadata) if metadata.dev() == device => mount = parent.to_owned(),
            _ => break,
        }
    }
    mount
}

/// The same by what every provider has: it says at the beginning of a job whether it takes points.
async fn look_at_job(provider: &dyn Provider, typed: &TypedTarget, report: &mut Report) -> bool {
    match provider.job_init().await {
        Ok(id) => report.good(format!("it is target {id}, and can be opened")),
        Err(error) => {
            report.failure(&provider_failure(&error, Guest::NotConcerned).at(typed));
            return false;
        }
    }
    if let Err(error) = provider.job_cleanup().await {
        report.bad(crate::failure::chain(&error), None);
    }
    true
}

async fn look_at_points(provider: &dyn Provider, typed: &TypedTarget, droppable: bool, report: &mut Report) {
    let place = typed.options();
    let points = match provider.points(None).await {
        Ok(points) => points,
        Err(error) => return report.failure(&provider_failure(&error, Guest::NotConcerned).at(typed)),
    };
    let damaged: Vec<_> = points.iter().filter(|point| point.damage.is_some()).collect();
    match points.len() {
        0 => report.good("no point yet"),
        all => report.good(format!("{} points that look good", all.saturating_sub(damaged.len()))),
    }
    let mut latest: BTreeMap<_, &PointSummary> = BTreeMap::new();
    for point in &points {
        let newest = latest.entry(&point.vm).or_insert(point);
        if point.sequence >= newest.sequence {
            *newest = point;
        }
    }
    for point in damaged {
        let what = format!("{}/{}: {}", point.vm, point.id, point.damage.as_deref().unwrap_or_default());
        let is_latest = latest.get(&point.vm).is_some_and(|latest| latest.damage.is_some());
        let next = match (is_latest, droppable) {
            (true, _) => format!("stillpoint backup {} --full{place}", point.vm),
            (false, true) => format!("stillpoint forget {} --damaged{place}", point.vm),
            (false, false) => format!("stillpoint verify {}/{}{place}", point.vm, point.id),
        };
        report.bad(what, Some(&next));
    }
}
