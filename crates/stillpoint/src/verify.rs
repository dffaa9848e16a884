//! Reading points again: which are good, which are not, and what can still be restored.

use crate::{
    cli,
    commands::{list, resolve, watched},
    config::Config,
    failure::{Exit, Failure, Guest},
    progress::BytesProgress,
    provider_failure::{TypedTarget, provider_failure},
    text::{self, print},
};
use serde_json::json;
use std::{collections::BTreeMap, path::Path, sync::Arc, time::Instant};
use stillpoint_model::{Length, PointId, VmName};
use stillpoint_provider::{Depth, Finding, PointSummary, Provider, VerifyReport};

/// `verify`.
///
/// # Errors
/// If anything is damaged, and if there is nothing to verify.
pub(crate) async fn run(path: &Path, arguments: &cli::Verify) -> Result<Exit, Failure> {
    let config = Config::read(path)?;
    let provider = config.provider(&arguments.place, path)?;
    let droppable = config.directory(&arguments.place, path)?.is_some();
    let verified = verify(provider.as_ref(), arguments, droppable).await;
    provider.close().await;
    verified
}

/// What all points share. `None` if they share nothing.
async fn verify_target(provider: &dyn Provider, depth: Depth) -> Result<Option<VerifyReport>, Failure> {
    let progress = Arc::new(BytesProgress::start(watched(), provider.name()));
    let report = provider.verify_target(depth, Arc::clone(&progress) as _).await;
    progress.finish();
    let report = report.map_err(|error| provider_failure(&error, Guest::NotConcerned))?;
    if report.is_none() && depth != Depth::Full {
        return Err(Failure::usage(format!(
            "{} has points of their own, which are verified whole",
            provider.name()
        ))
        .next("leave out --structure and --sample"));
    }
    Ok(report)
}

async fn verify(provider: &dyn Provider, arguments: &cli::Verify, droppable: bool) -> Result<Exit, Failure> {
    let started = Instant::now();
    let depth = match (arguments.structure, arguments.sample) {
        (true, _) => Depth::Structure,
        (false, Some(percent)) => Depth::Sample(percent),
        (false, None) => Depth::Full,
    };
    let (mut points, mut shared, mut nothing) = (Vec::new(), None, false);
    if arguments.points.is_empty() {
        shared = verify_target(provider, depth).await?;
        let all = list(provider, None).await?;
        nothing = all.is_empty();
        if depth == Depth::Full {
            points.extend(all.into_iter().map(|point| (point.vm, point.id)));
        }
    }
    for name in &arguments.points {
        points.push(resolve(provider, name).await?);
    }
    if let Some(report) = &shared
        && !arguments.json
    {
        let state = if report.findings.is_empty() { "good" } else { "DAMAGED" };
        print(format!("{}  {state}, {} compared", provider.name(), text::bytes(report.checked)));
        report.findings.iter().for_each(print_finding);
    }
    let (mut checked, mut results, mut reports) = (Length::ZERO, Vec::new(), Reports::new());
    for (vm, id) in points {
        let progress = Arc::new(BytesProgress::start(watched(), format!("{vm}/{id}")));
        let report = provider.verify(&vm, &id, Arc::clone(&progress) as _).await;
        progress.finish();
        let report = report.map_err(|error| provider_failure(&error, Guest::NotConcerned))?;
        checked = checked.saturating_add(report.checked);
        results.push(json!({
            "vm": vm,
            "point": id,
            "checked_bytes": report.checked,
            "findings": report.findings,
            "restorable": report.restorable,
        }));
        if !arguments.json {
            print_report(&vm, &id, &report);
        }
        reports.insert((vm, id), report);
    }
    let broken = shared.as_ref().is_some_and(|report| !report.findings.is_empty());
    let damaged = reports.values().filter(|report| !report.findings.is_empty()).count();
    checked = checked.saturating_add(shared.as_ref().map_or(Length::ZERO, |report| report.checked));
    let outlooks = if damaged > 0 { outlooks(provider, &reports).await? } else { Vec::new() };
    if arguments.json {
        let latest: BTreeMap<_, _> =
            outlooks.iter().map(|outlook| (&outlook.vm, outlook.latest_good.as_ref())).collect();
        print(json!({
            "points": results,
            "damaged": damaged,
            "checked_bytes": checked,
            "target": shared,
            "latest_good": latest,
        }));
    } else if !reports.is_empty() {
        let good = reports.len().saturating_sub(damaged);
        print(format!(
            "{good} good, {damaged} damaged; {} compared in {}",
            text::bytes(checked),
            text::duration(started.elapsed())
        ));
        outlooks.iter().for_each(|outlook| print(&outlook.text));
    }
    if nothing && !broken {
        let what = format!("there is no point in {}; nothing was verified", provider.name());
        return Err(Failure::new(Exit::Failed, what).next("make a point first: stillpoint backup VM"));
    }
    let place = TypedTarget::of(&arguments.place).options().to_owned();
    match (damaged, broken) {
        (0, false) => Ok(Exit::Done),
        (0, true) => Err(Failure::new(Exit::Failed, format!("{} is damaged", provider.name()))
            .next(shared_next(&arguments.place, droppable))),
        _ => Err(Failure::new(Exit::Failed, format!("{damaged} of {} points are damaged", reports.len()))
            .next(next(&outlooks, &place, droppable))),
    }
}

type Reports = BTreeMap<(VmName, PointId), VerifyReport>;

fn print_report(vm: &VmName, id: &PointId, report: &VerifyReport) {
    if report.findings.is_empty() {
        return print(format!("{vm}/{id}  good, {} compared", text::bytes(report.checked)));
    }
    print(format!("{vm}/{id}  DAMAGED"));
    report.findings.iter().for_each(print_finding);
    if !report.restorable.is_empty() {
        let disks: Vec<_> = report.restorable.iter().map(|disk| format!("--disk {disk}")).collect();
        print(format!("  can be restored all the same: {}", disks.join(" ")));
    }
}

fn print_finding(finding: &Finding) {
    let disk = finding.disk.as_ref().map(|disk| format!("disk {disk}: ")).unwrap_or_default();
    let place = finding.offset.map(|offset| format!(" (at {offset})")).unwrap_or_default();
    print(format!("  {disk}{}{place}", finding.what));
}

/// How a VM stands that has damaged points.
struct Outlook {
    vm: VmName,
    /// The newest good point, of those that were verified or look good.
    latest_good: Option<PointId>,
    /// Whether that is newer than all that is damaged.
    ahead: bool,
    text: String,
}

async fn outlooks(provider: &dyn Provider, reports: &Reports) -> Result<Vec<Outlook>, Failure> {
    let mut vms: Vec<_> = reports.keys().map(|(vm, _)| vm.clone()).collect();
    vms.dedup();
    let mut outlooks = Vec::new();
    for vm in vms {
        let of_vm = reports.iter().filter(|((of, _), _)| *of == vm);
        if of_vm.clone().all(|(_, report)| report.findings.is_empty()) {
            continue;
        }
        let mut points = list(provider, Some(&vm)).await?;
        points.sort_by_key(|point| point.sequence);
        outlooks.push(outlook(vm, &points, reports));
    }
    Ok(outlooks)
}

fn outlook(vm: VmName, points: &[PointSummary], reports: &Reports) -> Outlook {
    let report = |point: &PointSummary| reports.get(&(vm.clone(), point.id.clone()));
    let is_good = |point: &PointSummary| match report(point) {
        Some(report) => report.findings.is_empty(),
        None => point.damage.is_none(),
    };
    let good: Vec<_> = points.iter().filter(|point| is_good(point)).collect();
    let latest = good.last().copied();
    // One that cannot be read has no number any more; its name tells its time.
    let is_older = |point: &PointSummary, latest: &PointSummary| match point.sequence {
        0 => point.id < latest.id,
        sequence => sequence < latest.sequence,
    };
    let ahead =
        latest.is_some_and(|latest| points.iter().all(|point| is_good(point) || is_older(point, latest)));
    let text = match latest {
        None => format!("{vm}: none of its {} points is good", points.len()),
        Some(latest) => {
            let unread = good.iter().filter(|point| report(point).is_none()).count();
            let unread =
                if unread > 0 { format!(" ({unread} of them not verified now)") } else { String::new() };
            let newer = if ahead { ", newer than all that is damaged" } else { "; what is newer is damaged" };
            format!(
                "{vm}: {} of {} points can be restored{unread}, the latest is {vm}/{}{newer}",
                good.len(),
                points.len(),
                latest.id
            )
        }
    };
    Outlook { latest_good: latest.map(|point| point.id.clone()), ahead, text, vm }
}

/// What to type: a new full point where the newest is damaged; otherwise nothing is missing, and what is damaged can go.
fn next(outlooks: &[Outlook], place: &str, droppable: bool) -> String {
    let behind: Vec<_> =
        outlooks.iter().filter(|outlook| !outlook.ahead).map(|outlook| outlook.vm.as_str()).collect();
    if !behind.is_empty() {
        return format!("make a new full point now: stillpoint backup {} --full{place}", behind.join(" "));
    }
    match droppable {
        true => {
            format!("newer points are good; to drop what is of no use: stillpoint forget --damaged{place}")
        }
        false => "newer points are good; the damaged ones can be forgotten".to_owned(),
    }
}

/// What to type if only what points share is damaged.
fn shared_next(place: &cli::Where, droppable: bool) -> String {
    let name = match (&place.to, &place.target) {
        (Some(_), _) => TypedTarget::of(place).options().to_owned(),
        (None, Some(name)) => format!(" {}", name.escape_debug()),
        (None, None) => " NAME".to_owned(),
    };
    match droppable {
        true => format!("give the target a new identity, and keep its points: stillpoint target init{name}"),
        false => "make a new full point now: stillpoint backup VM --full".to_owned(),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn point(sequence: u64, damage: Option<&str>) -> PointSummary {
        PointSummary {
            record: None,
            vm: "web01".parse().unwrap(),
            id: format!("20261123T162855Z-{sequence:08}").parse().unwrap(),
            sequence,
            stored: Length::ZERO,
            damage: damage.map(str::to_owned),
        }
    }

    #[test]
    fn a_new_full_is_asked_for_only_while_the_newest_point_is_damaged() {
        let vm: VmName = "web01".parse().unwrap();
        let finding = Finding { disk: None, offset: None, what: "gone".to_owned() };
        let bad = VerifyReport { findings: vec![finding], ..VerifyReport::default() };
        let reports = |damaged: &[u64], verified: &[u64]| -> Reports {
            let damaged = damaged.iter().map(|at| (at, bad.clone()));
            let all = damaged.chain(verified.iter().map(|at| (at, VerifyReport::default())));
            all.map(|(at, report)| ((vm.clone(), point(*at, None).id), report)).collect()
        };
        let points: Vec<_> = (1..=4).map(|at| point(at, None)).collect();
        for (damaged, verified, ahead, latest, words) in [
            (&[2, 3][..], &[1, 4][..], true, Some(4), "2 of 4 points can be restored, the latest is"),
            (&[3, 4], &[1, 2], false, Some(2), "what is newer is damaged"),
            (&[1, 2, 3, 4], &[], false, None, "none of its 4 points is good"),
            (&[2], &[], true, Some(4), "3 of 4 points can be restored (3 of them not verified now)"),
        ] {
            let found = outlook(vm.clone(), &points, &reports(damaged, verified));
            assert_eq!(found.ahead, ahead, "{damaged:?}");
            assert_eq!(found.latest_good, latest.map(|at| point(at, None).id), "{damaged:?}");
            assert!(found.text.contains(words), "{}", found.text);
            let next = next(&[found], " --to /b", true);
            let wanted = if ahead {
                "stillpoint forget --damaged --to /b"
            } else {
                "stillpoint backup web01 --full --to /b"
            };
            assert!(next.contains(wanted), "{next}");
        }
    }
}
