//! What a command costs, and contenders that take turns.

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

/// How often memory is looked at; what the kernel tells is the most so far, so little is missed.
const LOOK: Duration = Duration::from_millis(50);
/// What `fsync` may take of an output that was left durable.
const SYNCED: Duration = Duration::from_millis(300);

/// What one run of a command cost.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Cost {
    /// Wall clock.
    pub(crate) seconds: f64,
    /// Of all its processes, user and system.
    pub(crate) cpu_seconds: f64,
    /// The most that all its processes together had resident, each at its own highest.
    pub(crate) peak_mib: f64,
}

/// Runs a command to its end.
pub(crate) fn cost(command: &mut Command) -> Result<(Cost, String)> {
    let cpu = children_cpu()?;
    let started = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("run {:?}", command.get_program()))?;
    let first = child.id();
    let (done, ended) = mpsc::channel::<()>();
    let watcher = std::thread::spawn(move || {
        let mut most = BTreeMap::new();
        while ended.recv_timeout(LOOK) == Err(mpsc::RecvTimeoutError::Timeout) {
            look(first, &mut most);
        }
        most.values().sum::<u64>()
    });
    let output = child.wait_with_output()?;
    let seconds = started.elapsed().as_secs_f64();
    drop(done);
    let peak = watcher.join().unwrap_or(0);
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let peak_mib = peak as f64 / 1024.0;
    let cost = Cost { seconds, cpu_seconds: children_cpu()? - cpu, peak_mib };
    Ok((cost, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Takes note of the highest resident size of a process and of those that it started, KiB. Only they are looked at: a walk
/// through all processes takes a tenth of a core from what is measured.
fn look(process: u32, most: &mut BTreeMap<u32, u64>) {
    let place = PathBuf::from(format!("/proc/{process}"));
    let status = fs::read_to_string(place.join("status")).unwrap_or_default();
    let highest = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    if let Some(highest) = highest.and_then(|line| line.split_whitespace().next()?.parse().ok()) {
        most.insert(process, highest);
    }
    let Ok(threads) = fs::read_dir(place.join("task")) else { return };
    for thread in threads.flatten() {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children
            .split_whitespace()
            .filter_map(|child| child.parse().ok())
            .for_each(|child| look(child, most));
    }
}

/// Seconds that all children took that have ended (proc(5), `cutime` and `cstime`).
fn children_cpu() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (_, rest) = stat.rsplit_once(") ").context("/proc/self/stat")?;
    let ticks = rest.split(' ').skip(13).take(2).map(|ticks| ticks.parse::<u64>().unwrap_or(0));
    // A hundredth of a second on every Linux that users see.
    Ok(ticks.sum::<u64>() as f64 / 100.0)
}

/// Fails if what is in `path` was not on stable storage when its writer said that it had ended.
pub(crate) fn assert_durable(path: &Path) -> Result<()> {
    let mut files = Vec::new();
    collect(path, &mut files)?;
    ensure!(!files.is_empty(), "{} has no files", path.display());
    let started = Instant::now();
    for file in &files {
        fs::File::open(file)?.sync_all()?;
    }
    let took = started.elapsed();
    ensure!(
        took < SYNCED + Duration::from_micros(200) * u32::try_from(files.len())?,
        "what was written to {} was not durable: syncing it took {took:?}",
        path.display()
    );
    Ok(())
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            collect(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_owned());
    }
    Ok(())
}

/// One of those that do the same work.
pub(crate) struct Contender<'a> {
    pub(crate) name: &'static str,
    /// As a user would type it.
    pub(crate) line: String,
    /// Makes ready, does the work and checks it; tells what the work alone cost.
    pub(crate) run: Box<dyn FnMut() -> Result<Cost> + 'a>,
}

/// All turns of one contender.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) line: String,
    pub(crate) seconds: Vec<f64>,
    pub(crate) median: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) peak_mib: f64,
}

impl Row {
    pub(crate) fn of(name: &str, line: &str, costs: &[Cost]) -> Self {
        let all = |of: fn(&Cost) -> f64| costs.iter().map(of).collect::<Vec<_>>();
        Self {
            name: name.to_owned(),
            line: line.to_owned(),
            median: median(&all(|cost| cost.seconds)),
            seconds: all(|cost| cost.seconds),
            cpu_seconds: median(&all(|cost| cost.cpu_seconds)),
            peak_mib: all(|cost| cost.peak_mib).into_iter().fold(0.0, f64::max),
        }
    }
}

/// Lets all contenders take turns. The first turn of each is not counted: it warms caches up.
pub(crate) fn take_turns(rounds: usize, mut contenders: Vec<Contender<'_>>) -> Result<Vec<Row>> {
    let mut costs: Vec<Vec<Cost>> = contenders.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        for (contender, costs) in contenders.iter_mut().zip(&mut costs) {
            // What one left to be written must not slow down the next.
            rustix::fs::sync();
            let cost = (contender.run)().with_context(|| format!("{}, round {round}", contender.name))?;
            println!("   {} {:.2} s", contender.name, cost.seconds);
            if round > 0 {
                costs.push(cost);
            }
        }
    }
    let row =
        |(contender, costs): (Contender<'_>, Vec<Cost>)| Row::of(contender.name, &contender.line, &costs);
    Ok(contenders.into_iter().zip(costs).map(row).collect())
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.len() % 2) {
        (None, _) => 0.0,
        (Some(middle), 1) => *middle,
        (Some(upper), _) => (upper + sorted.get(middle - 1).copied().unwrap_or(*upper)) / 2.0,
    }
}
