//! From a parsed command line to an exit status.

use crate::{
    backup::Job,
    bitmaps,
    cli::{self, Cli, Command, PointName},
    config::{Config, Vm},
    doctor,
    failure::{Exit, Failure, Guest},
    interrupt::Interrupt,
    places::Places,
    provider_check,
    provider_failure::{TypedTarget, provider_failure},
    repository, restore, target,
    text::{self, note, print},
    verify,
    vm::{self, Found},
};
use serde_json::json;
use std::{io::IsTerminal as _, path::Path};
use stillpoint_model::{Length, PointId, VmName};
use stillpoint_provider::{BitmapMode, PointSummary, Provider};
use stillpoint_provider_directory::DirectoryProvider;

/// Runs the command and tells what came of it.
pub async fn run(cli: Cli) -> Exit {
    let target = TypedTarget::of_command(&cli.command);
    let result = match cli.command {
        Command::Backup(arguments) => return backup(&cli.config, arguments).await,
        Command::Points(arguments) => points(&cli.config, &arguments).await,
        Command::Restore(arguments) => restore::run(&cli.config, &arguments).await,
        Command::Verify(arguments) => verify::run(&cli.config, &arguments).await,
        Command::Doctor(arguments) => doctor::run(&cli.config, &arguments).await,
        Command::Bitmaps(command) => bitmaps::run(&cli.config, &command).await,
        Command::Recover(arguments) => recover(&cli.config, &arguments).await,
        Command::Provider(command) => provider_check::run(&command).await,
        Command::Target(cli::Target::Init { name, to }) => {
            target::init(&cli.config, name.as_deref(), to.as_deref()).await
        }
        Command::Forget(arguments) => repository::forget(&cli.config, &arguments).await,
        Command::Prune(arguments) => repository::prune(&cli.config, &arguments).await,
        Command::Key(command) => repository::key(&cli.config, &command).await,
    };
    match result {
        Ok(exit) => exit,
        Err(failure) => {
            let failure = failure.at(&target);
            note(&failure);
            failure.exit
        }
    }
}

/// Whether a person watches.
pub(crate) fn watched() -> bool {
    std::io::stderr().is_terminal()
}

async fn backup(path: &Path, arguments: cli::Backup) -> Exit {
    let target = TypedTarget::of(&arguments.place);
    let fail = |failure: Failure| {
        let failure = failure.at(&target);
        if arguments.json {
            print(json!({
                "vm": failure.vm(),
                "point": null,
                "result": "failed",
                "guest": failure.guest_word(),
                "exit_status": failure.exit.number(),
                "error": failure.what(),
            }));
        }
        note(&failure);
        failure.exit
    };
    let prepared = prepare(path, &arguments);
    let (provider, directory, vms) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => return fail(failure.before_the_guest()),
    };
    let interrupt = match Interrupt::listen() {
        Ok(interrupt) => interrupt,
        Err(error) => {
            return fail(Failure::because(Exit::Failed, "cannot listen for signals", &error));
        }
    };
    let mut runs = Runs::default();
    for (name, vm) in &vms {
        let job = Job {
            name: name.clone(),
            vm,
            provider: provider.as_ref(),
            directory: directory.as_ref(),
            places: Some(Places::of_this_host()),
            full: arguments.full,
            progress: watched(),
        };
        let exit = match job.run(&interrupt).await {
            Ok(summary) if arguments.json => {
                print(summary.json());
                for warning in &summary.warnings {
                    note(format!("warning: VM {}: {warning}", summary.record.vm));
                }
                runs.done(&summary.record.vm, summary.exit)
            }
            Ok(summary) => {
                print(&summary);
                runs.done(&summary.record.vm, summary.exit)
            }
            Err(failure) => {
                let failure = match name {
                    Some(name) => failure.of_vm(name),
                    None => failure,
                };
                let vm = failure.vm().cloned();
                runs.failed(vm.as_ref(), fail(failure))
            }
        };
        runs.worst = runs.worst.worst(exit);
        if interrupt.is_set() {
            break;
        }
    }
    if vms.len() > 1 {
        note(runs.last_line(&vms));
    }
    runs.worst
}

/// What came of several VMs.
struct Runs {
    worst: Exit,
    begun: usize,
    done: usize,
    failed: Vec<String>,
    left_behind: Vec<String>,
}

impl Default for Runs {
    fn default() -> Self {
        Self { worst: Exit::Done, begun: 0, done: 0, failed: Vec::new(), left_behind: Vec::new() }
    }
}

impl Runs {
    /// There is a point.
    fn done(&mut self, vm: &VmName, exit: Exit) -> Exit {
        self.done = self.done.saturating_add(1);
        self.ended(vm.to_string(), exit)
    }

    /// There is none.
    fn failed(&mut self, vm: Option<&VmName>, exit: Exit) -> Exit {
        let name = vm.map_or_else(|| "?".to_owned(), ToString::to_string);
        self.failed.push(name.clone());
        self.ended(name, exit)
    }

    fn ended(&mut self, name: String, exit: Exit) -> Exit {
        self.begun = self.begun.saturating_add(1);
        if exit == Exit::LeftBehind {
            self.left_behind.push(name);
        }
        exit
    }

    /// The last line of a run on several VMs.
    fn last_line(&self, vms: &Vms) -> String {
        let mut line = format!("{} of {} done", self.done, vms.len());
        let not_begun = vms.iter().skip(self.begun);
        let not_begun = not_begun.map(|(name, _)| name.as_ref().map_or("?", VmName::as_str).to_owned());
        for (what, names) in [
            ("failed", self.failed.clone()),
            ("not begun", not_begun.collect()),
            ("needs recover", self.left_behind.clone()),
        ] {
            if !names.is_empty() {
                line.push_str(&format!("; {what}: {}", names.join(", ")));
            }
        }
        line
    }
}

type Vms = Vec<(Option<VmName>, Vm)>;

type Prepared = (Box<dyn Provider>, Option<DirectoryProvider>, Vms);

fn prepare(path: &Path, arguments: &cli::Backup) -> Result<Prepared, Failure> {
    let config = Config::read(path)?;
    let provider = config.provider(&arguments.place, path)?;
    let directory = config.directory(&arguments.place, path)?;
    let mut vms: Vms = if let Some(socket) = &arguments.qmp {
        let name = match arguments.vms.as_slice() {
            [] => None,
            [one] => Some(one.clone()),
            _ => return Err(Failure::usage("--qmp is one VM's socket; name at most one VM with it")),
        };
        // A VM of the configuration file keeps its files and excludes, whatever socket is named.
        let known = name.as_ref().and_then(|name| config.vm.get(name)).cloned();
        let mut vm = known.unwrap_or_else(|| Vm::at(socket.clone(), None));
        vm.qmp = Some(socket.clone());
        if arguments.agent.is_some() {
            vm.agent.clone_from(&arguments.agent);
        }
        vec![(name, vm)]
    } else if arguments.all {
        config.vm.iter().map(|(name, vm)| (Some(name.clone()), vm.clone())).collect()
    } else {
        let named = arguments.vms.iter().map(|name| Ok((Some(name.clone()), config.vm(name, path)?.clone())));
        named.collect::<Result<_, Failure>>()?
    };
    if vms.is_empty() {
        return Err(Failure::usage(format!("{} has no VM", path.display())));
    }
    for (_, vm) in &mut vms {
        vm.exclude_now.clone_from(&arguments.exclude);
    }
    Ok((provider, directory, vms))
}

async fn points(path: &Path, arguments: &cli::Points) -> Result<Exit, Failure> {
    let provider = Config::read(path)?.provider(&arguments.place, path)?;
    let found = list(provider.as_ref(), arguments.vm.as_ref()).await;
    provider.close().await;
    let found = found?;
    if arguments.json {
        print(serde_json::to_string_pretty(&found).unwrap_or_default());
        return Ok(Exit::Done);
    }
    if found.is_empty() {
        let of = arguments.vm.as_ref().map(|vm| format!(" of VM {vm}")).unwrap_or_default();
        note(format!("no point{of} in {}", provider.name()));
        return Ok(Exit::Done);
    }
    let width =
        found.iter().map(|point| point.vm.as_str().len()).max().unwrap_or(0).saturating_add(26).max(5);
    print(format!(
        "{:width$}  {:23}  {:>5}  {:>9}  {:>9}  {}",
        "point", "time", "disks", "size", "stored", "read"
    ));
    for point in &found {
        let name = format!("{}/{}", point.vm, point.id);
        match &point.record {
            Some(record) => {
                let size: Length = record.disks.iter().map(|disk| disk.size).sum();
                let reused = record.disks.iter().filter(|disk| disk.bitmap_mode == BitmapMode::Reuse).count();
                let read = match record.disks.len() {
                    0 => "configuration".to_owned(),
                    all if reused == all => "incremental".to_owned(),
                    _ if reused == 0 => "full".to_owned(),
                    all => format!("{} of {all} full", all.saturating_sub(reused)),
                };
                let damage =
                    point.damage.as_ref().map(|damage| format!("  DAMAGED: {damage}")).unwrap_or_default();
                print(format!(
                    "{name:width$}  {:23}  {:>5}  {:>9}  {:>9}  {read}{damage}",
                    record.time,
                    record.disks.len(),
                    text::bytes(size),
                    text::bytes(point.stored)
                ));
            }
            None => {
                print(format!("{name:width$}  DAMAGED: {}", point.damage.as_deref().unwrap_or("unreadable")))
            }
        }
    }
    Ok(Exit::Done)
}

pub(crate) async fn list(provider: &dyn Provider, vm: Option<&VmName>) -> Result<Vec<PointSummary>, Failure> {
    provider.points(vm).await.map_err(|error| provider_failure(&error, Guest::NotConcerned))
}

/// The point that a person means.
///
/// # Errors
/// If there is none of that name, or more than one.
pub(crate) async fn resolve(provider: &dyn Provider, name: &PointName) -> Result<(VmName, PointId), Failure> {
    let place = provider.name();
    let none = |what: String| {
        Failure::new(Exit::Failed, format!("there is no {what} in {place}"))
            .next("stillpoint points{target}, to see what there is")
    };
    match name {
        PointName::Of(vm, id) => Ok((vm.clone(), id.clone())),
        PointName::LatestOf(vm) => {
            let found = list(provider, Some(vm)).await?;
            let latest = found.into_iter().max_by_key(|point| point.sequence);
            latest.map(|point| (point.vm, point.id)).ok_or_else(|| none(format!("point of VM {vm}")))
        }
        PointName::Alone(id) => {
            let found = list(provider, None).await?;
            let mut found = found.into_iter().filter(|point| point.id == *id);
            let Some(first) = found.next() else { return Err(none(format!("point {id}"))) };
            if let Some(other) = found.next() {
                let what = format!("more than one VM has a point {id} in {place}");
                return Err(
                    Failure::usage(what).next(format!("name one: {}/{id} or {}/{id}", first.vm, other.vm))
                );
            }
            Ok((first.vm, first.id))
        }
    }
}

async fn recover(path: &Path, arguments: &cli::Recover) -> Result<Exit, Failure> {
    let socket = match (&arguments.qmp, &arguments.vm) {
        (Some(socket), _) => socket.clone(),
        (None, Some(name)) => Config::read(path)?.vm(name, path)?.qmp.clone().ok_or_else(|| {
            Failure::usage(format!("VM {name} has no `qmp` socket, so no run can have left anything in it"))
        })?,
        (None, None) => return Err(Failure::usage("name a VM, or its socket with --qmp")),
    };
    let vm = match vm::lock(&socket).await? {
        Found::Running(vm) => vm,
        Found::Absent(failure) => return Err(failure),
    };
    let recovered = vm::recover(&vm.qmp, &format!("stillpoint recover --qmp {}", socket.display())).await?;
    let undone = recovered.undone.len();
    print(match (undone, recovered.ended) {
        (0, _) => "nothing to undo: no earlier run left anything in this VM".to_owned(),
        (_, false) => format!("undone: {undone} things; the VM is as it was"),
        (_, true) => format!("undone: {undone} things; the VM is off, as its guest wished"),
    });
    Ok(Exit::Done)
}
