//! What an earlier run left in a VM, and how it is undone.
//!
//! QEMU itself tells what is there, by our names; the journal adds what QEMU cannot tell (whose the NBD server is, who
//! paused or froze the guest, whether its power-off is held up, and on which node a filter stood, should the graph not
//! say). Undoing is the same code as in a run that goes well, and
//! can be cut off and begun again anywhere: each time it looks first.
//!
//! Bitmaps of the chain are no left-overs. After a death both may be there, both complete; the next run asks the
//! provider which one counts (see the `bitmap` module).

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    fleecing,
    graph::children,
    inspect::{ask, refuse_old},
    journal::Journal,
    names::{self, is_ours},
    power, process,
    step::Step,
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};
use stillpoint_model::NodeName;
use stillpoint_qmp::Qmp;

/// What an earlier run left in a VM.
#[derive(Debug)]
pub struct LeftOvers {
    steps: Vec<Step>,
    /// Whether a power-off of the guest is held up, to be granted when all else is undone.
    held_power: bool,
    /// What is in the way of undoing more than the guest's pause and freeze.
    obstacle: Option<Error>,
    runtime: PathBuf,
}

impl LeftOvers {
    /// Looks, and touches nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] on a QEMU that is too old for us to have left anything; if QEMU does not answer.
    pub async fn find(qmp: &Qmp, runtime: &Path) -> Result<Self> {
        refuse_old(&qmp.version())?;
        let journal = Journal::read(runtime, qmp);
        let mut found = Self {
            steps: Vec::new(),
            held_power: journal.contains(&Step::ShutdownAction),
            obstacle: storage_that_hangs(&journal).await,
            runtime: runtime.to_owned(),
        };
        if found.obstacle.is_none() {
            match in_the_graph(qmp, &journal).await {
                Ok(steps) => found.steps = steps,
                Err(error) if error.kind() == ErrorKind::LeftBehind => found.obstacle = Some(error),
                Err(error) => return Err(error),
            }
        }
        // Last, so that it is undone first.
        let last = |one: &str, other: &str| {
            journal.iter().rev().find(|step| step.name() == one || step.name() == other).cloned()
        };
        found.steps.extend(last("freeze", "thawed").filter(|step| step.name() == "freeze"));
        let status: Value = ask(qmp, command::query_status()).await?;
        let paused = status.get("status").and_then(Value::as_str) == Some("paused");
        found.steps.extend(last("pause", "resumed").filter(|step| paused && *step == Step::Pause));
        Ok(found)
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && !self.held_power && self.obstacle.is_none()
    }

    /// A line for each.
    pub fn describe(&self) -> Vec<String> {
        let power = self.held_power.then(|| Step::ShutdownAction.describe());
        let obstacle = self.obstacle.as_ref().map(ToString::to_string);
        power.into_iter().chain(obstacle).chain(self.steps.iter().map(Step::describe)).collect()
    }

    /// Undoes all of it, going on whatever fails, and looks again. Last of all it grants the guest's power-off, if one
    /// was held up; `true` says that it ended QEMU.
    ///
    /// # Errors
    /// [`ErrorKind::LeftBehind`] if something is still there.
    pub async fn undo(self, qmp: &Qmp) -> Result<bool> {
        let mut first = None;
        for step in self.steps.iter().rev() {
            step.undo_on_host(&self.runtime);
            if let Err(error) = step.undo(qmp).await {
                let silent = error.kind() == ErrorKind::Silent;
                first.get_or_insert(error);
                if silent {
                    break;
                }
            }
            stillpoint_failpoint::reached(&format!("recovered:{}", step.name()));
        }
        if let Some(obstacle) = self.obstacle {
            return Err(obstacle);
        }
        if let Some(error) = first {
            return Err(Error::new(ErrorKind::LeftBehind, "not everything could be undone").because(error));
        }
        let rest = Self::look_again(qmp, &self.runtime).await?;
        if !rest.is_empty() {
            return Err(Error::new(ErrorKind::LeftBehind, format!("still in the VM: {}", rest.join(", "))));
        }
        let ended = if self.held_power { power::settle(qmp).await? } else { false };
        Journal::forget(&self.runtime, qmp);
        Ok(ended)
    }

    /// What QEMU itself still shows; the journal is not asked, since all that it tells of was undone.
    async fn look_again(qmp: &Qmp, runtime: &Path) -> Result<Vec<String>> {
        let found = Self::find(qmp, runtime).await?;
        let shown = |step: &&Step| {
            matches!(
                step,
                Step::Node { .. }
                    | Step::ReadBitmap { .. }
                    | Step::Drive { .. }
                    | Step::Junction { .. }
                    | Step::Export { .. }
                    | Step::Pause
            )
        };
        Ok(found.steps.iter().filter(shown).map(Step::describe).collect())
    }
}

/// What QEMU shows and the journal adds, in the order in which a run makes it.
async fn in_the_graph(qmp: &Qmp, journal: &[Step]) -> Result<Vec<Step>> {
    let nodes: Vec<Value> = ask(qmp, command::query_nodes()).await?;
    let blocks: Vec<Value> = ask(qmp, command::query_block()).await?;
    let exports: Vec<Value> = ask(qmp, command::query_exports()).await?;
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);

    let mut ours: Vec<NodeName> = Vec::new();
    let mut steps = Vec::new();
    for node in &nodes {
        let Some(name) = text(node, "node-name").and_then(|name| name.parse::<NodeName>().ok()) else {
            continue;
        };
        let bitmaps = node.get("dirty-bitmaps").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        if bitmaps.iter().any(|bitmap| bitmap.get("name").and_then(Value::as_str) == Some(names::READ_BITMAP))
        {
            steps.push(Step::ReadBitmap { node: name.clone() });
        }
        if is_ours(name.as_str()) {
            ours.push(name);
        }
    }
    let our_exports: Vec<String> =
        exports.iter().filter_map(|export| text(export, "id")).filter(|id| is_ours(id)).collect();
    let of_kind = |name: &str| journal.iter().filter(|step| step.name() == name).cloned().collect::<Vec<_>>();
    steps.extend(of_kind("fleecing-file"));
    steps.extend(of_kind("listener"));
    steps.extend(of_kind("descriptor"));
    // Alone with our exports, or with a run of ours that got as far as making some, the server is ours. With one that
    // only began to start it, its monitor's descriptor tells, so it has to be this monitor.
    let begun = Step::Begin { monitor: process::socket_key(qmp.path()) };
    let started =
        !of_kind("export").is_empty() || (journal.contains(&begun) && journal.contains(&Step::Server));
    let foreign_exports = exports.len() > our_exports.len();
    if !foreign_exports && (!our_exports.is_empty() || started) {
        steps.push(Step::Server);
    }
    // QEMU keeps a removed set until the guest runs: without a trace of a run that died it is no left-over.
    if !journal.is_empty() || !ours.is_empty() {
        let sets = our_fd_sets(qmp).await?;
        steps.extend(sets.into_iter().map(|opaque| Step::FdSet { opaque, directory: PathBuf::new() }));
    }
    // In the order in which a run makes them, so that undoing from the last is right.
    for role in ["fleece", "filter"] {
        let prefix = format!("{}{role}-", names::PREFIX);
        let of_role = ours.iter().filter(|name| name.as_str().starts_with(&prefix));
        steps.extend(of_role.map(|name| Step::Node { name: name.clone() }));
    }
    let (drives, junctions) = switched_drives(qmp, &blocks, journal).await?;
    steps.extend(drives);
    let junction_nodes = ours.iter().filter(|name| names::filter_of_junction(name.as_str()).is_some());
    steps.extend(junction_nodes.map(|name| Step::Node { name: name.clone() }));
    steps.extend(junctions);
    let access = format!("{}access-", names::PREFIX);
    let access = ours.iter().filter(|name| name.as_str().starts_with(&access));
    steps.extend(access.map(|name| Step::Node { name: name.clone() }));
    steps.extend(our_exports.into_iter().map(|id| Step::Export { id }));
    Ok(steps)
}

/// Whether the storage of fleecing images hangs. Then QEMU is not even asked about its nodes: it would wait for their
/// size, and the guest with it.
async fn storage_that_hangs(journal: &[Step]) -> Option<Error> {
    let directory = |step: &Step| match step {
        Step::Descriptor { directory, .. } | Step::FdSet { directory, .. } => Some(directory.clone()),
        _ => None,
    };
    for directory in journal.iter().filter_map(directory).collect::<BTreeSet<_>>() {
        if !fleecing::storage_answers(directory.clone()).await {
            let context = format!(
                "the storage of the fleecing images in {} does not answer, and taking them out would make the guest wait for \
                 it; the guest runs on. Try again when it answers",
                directory.display()
            );
            return Some(Error::new(ErrorKind::LeftBehind, context));
        }
    }
    None
}

async fn our_fd_sets(qmp: &Qmp) -> Result<Vec<String>> {
    let sets: Vec<Value> = ask(qmp, command::query_fd_sets()).await?;
    let descriptors = sets.iter().filter_map(|set| set.get("fds")?.as_array()).flatten();
    let opaque = descriptors.filter_map(|fd| fd.get("opaque")?.as_str());
    let mut ours: Vec<String> = opaque.filter(|name| is_ours(name)).map(str::to_owned).collect();
    ours.sort_unstable();
    ours.dedup();
    Ok(ours)
}

/// Front ends that are on a filter of ours, and those of them that are on a junction above it or still without it.
async fn switched_drives(qmp: &Qmp, blocks: &[Value], journal: &[Step]) -> Result<(Vec<Step>, Vec<Step>)> {
    let (mut drives, mut junctions) = (Vec::new(), Vec::new());
    let mut below = None;
    for block in blocks {
        let node = block.pointer("/inserted/node-name").and_then(Value::as_str);
        let qdev = block.get("qdev").and_then(Value::as_str);
        let (Some(node), Some(qdev)) = (node.filter(|node| is_ours(node)), qdev) else { continue };
        let front_end =
            if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") };
        let below = match &mut below {
            Some(below) => below,
            None => below.insert(children(qmp).await),
        };
        let named = |name: &str| name.parse::<NodeName>().ok();
        let junction = names::filter_of_junction(node);
        let filter = junction.as_deref().unwrap_or(node);
        let journaled = journal.iter().rev().find_map(|step| match step {
            Step::Drive { filter: known, original, .. } if known.as_str() == filter => Some(original.clone()),
            _ => None,
        });
        let (Some(on), Some(filter), Some(original)) =
            (named(node), named(filter), below.get(filter).and_then(|name| named(name)).or(journaled))
        else {
            let context = format!(
                "front end {front_end} is on our filter {node}, and nothing tells which node it had before"
            );
            return Err(Error::new(ErrorKind::LeftBehind, context));
        };
        if junction.is_some() {
            let (front_end, filter) = (front_end.clone(), filter.clone());
            junctions.push(Step::Junction { front_end, junction: on, filter });
        }
        drives.push(Step::Drive { front_end, filter, original });
    }
    Ok((drives, junctions))
}
