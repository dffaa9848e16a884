//! The command line: a contract that scripts depend on.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use stillpoint_model::{DiskName, PointId, VmName};

/// Where the configuration is unless told otherwise.
pub(crate) const CONFIG: &str = "/etc/stillpoint/stillpoint.toml";

/// Live, incremental, point-in-time backups of running QEMU/KVM virtual machines.
///
/// Exit status: 0 done, 1 failed and cleaned up, 2 usage or configuration, 3 something is left that `recover` must
/// undo, 4 locked by another run, 130 interrupted.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    /// Configuration file.
    #[arg(long, global = true, value_name = "FILE", default_value = CONFIG)]
    pub config: PathBuf,
    /// Say more (-v: what is done, -vv: each step).
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a point of each VM: all its disks at one instant.
    Backup(Backup),
    /// List points.
    Points(Points),
    /// Write the disks and configuration of a point to a directory.
    Restore(Restore),
    /// Read points again and compare them with what was recorded when they were made.
    Verify(Verify),
    /// Forget points of a repository that no rule keeps (what they alone needed is removed by `prune`), or damaged points of a directory.
    Forget(Forget),
    /// Remove from a repository what no point needs any more.
    Prune(Prune),
    /// Manage the keys of a repository; each opens it with a password of its own.
    #[command(subcommand)]
    Key(Key),
    /// Look whether everything is in place; each finding comes with the next command to type.
    Doctor(Doctor),
    /// See and remove the bitmaps that Stillpoint keeps in a VM's images, one for each disk and target.
    #[command(subcommand)]
    Bitmaps(Bitmaps),
    /// Undo what a run that died left in a VM.
    Recover(Recover),
    /// Manage targets.
    #[command(subcommand)]
    Target(Target),
    /// Help with writing providers.
    #[command(subcommand)]
    Provider(Provider),
}

/// Where points are kept.
#[derive(Debug, Clone, Args)]
pub struct Where {
    /// A target of the configuration file (needed only if it has several).
    #[arg(long, value_name = "NAME", conflicts_with = "to")]
    pub target: Option<String>,
    /// A directory, instead of a target of the configuration file.
    #[arg(long, value_name = "DIRECTORY")]
    pub to: Option<PathBuf>,
}

/// `backup`.
#[derive(Debug, Args)]
pub struct Backup {
    /// VMs of the configuration file; with --qmp one name of your choice, or none for the name that QEMU was given.
    #[arg(value_name = "VM", required_unless_present_any = ["all", "qmp"])]
    pub vms: Vec<VmName>,
    /// All VMs of the configuration file.
    #[arg(long, conflicts_with_all = ["vms", "qmp"])]
    pub all: bool,
    #[command(flatten)]
    pub place: Where,
    /// Monitor socket of the VM (QMP), instead of the configuration file's.
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// Guest agent's socket, to freeze the guest's file systems for the instant.
    #[arg(long, value_name = "SOCKET", requires = "qmp")]
    pub agent: Option<PathBuf>,
    /// Leave this disk out (may be given several times), besides those that the configuration excludes.
    #[arg(long, value_name = "DISK")]
    pub exclude: Vec<DiskName>,
    /// Read all disks in full, whatever the bitmaps say.
    #[arg(long)]
    pub full: bool,
    /// Print one JSON object a VM.
    #[arg(long)]
    pub json: bool,
}

/// `points`.
#[derive(Debug, Args)]
pub struct Points {
    /// Only this VM's.
    pub vm: Option<VmName>,
    #[command(flatten)]
    pub place: Where,
    /// Print one JSON array.
    #[arg(long)]
    pub json: bool,
}

/// A point as it is typed.
#[derive(Debug, Clone)]
pub enum PointName {
    /// `VM/ID`.
    Of(VmName, PointId),
    /// `VM/latest`.
    LatestOf(VmName),
    /// `ID`, which is enough where no other VM has a point of that name.
    Alone(PointId),
}

impl std::str::FromStr for PointName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words = |error: stillpoint_model::NameError| error.to_string();
        let Some((vm, id)) = text.split_once('/') else {
            let alone = text.parse().map(Self::Alone);
            return alone.map_err(|_| "a point is typed as VM/ID, VM/latest or ID".to_owned());
        };
        let vm = vm.parse().map_err(words)?;
        match id {
            "latest" => Ok(Self::LatestOf(vm)),
            id => Ok(Self::Of(vm, id.parse().map_err(words)?)),
        }
    }
}

/// `restore`.
#[derive(Debug, Args)]
pub struct Restore {
    /// The point: VM/ID, VM/latest, or ID if it is the only one of that name.
    pub point: PointName,
    #[command(flatten)]
    pub place: Where,
    /// Directory to write to; it is created, and nothing in it is overwritten.
    #[arg(long, value_name = "DIRECTORY")]
    pub output: PathBuf,
    /// Only this disk (may be given several times).
    #[arg(long = "disk", value_name = "NAME")]
    pub disks: Vec<DiskName>,
    /// Format of the images.
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub format: Format,
}

/// Format of restored images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Sparse raw image.
    Raw,
    /// qcow2 without a backing file.
    Qcow2,
}

/// `verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// Points: VM/ID, VM/latest or ID; all points, and all that they share, if none is given. If there is none at all, that is a failure
    /// (exit status 1): nothing was verified.
    pub points: Vec<PointName>,
    #[command(flatten)]
    pub place: Where,
    /// Of a repository: only that everything is there that is referred to, without reading the data.
    #[arg(long, conflicts_with_all = ["points", "sample"])]
    pub structure: bool,
    /// Of a repository: read only so many percent of the data, others each time.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100), conflicts_with = "points")]
    pub sample: Option<u8>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `forget`. A point that any rule keeps is kept; time is counted back from a VM's newest point. Rules are for repositories, --damaged is
/// for directories.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("rules").multiple(true).required(true))]
pub struct Forget {
    /// Only this VM's points; each VM's if none is given.
    pub vm: Option<VmName>,
    #[command(flatten)]
    pub place: Where,
    /// Drop the damaged points of a directory: those of which nothing can be restored, or `any` that is not whole. All points are read.
    /// One that a good point needs is kept.
    #[arg(long, value_name = "WHICH", group = "rules", num_args = 0..=1, require_equals = true, default_missing_value = "beyond-use",
          conflicts_with_all = ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "keep_within"])]
    pub damaged: Option<Damaged>,
    /// Keep the newest N points.
    #[arg(long, value_name = "N", group = "rules")]
    pub keep_last: Option<u32>,
    /// Keep the newest point of each of the last N hours that have one.
    #[arg(long, value_name = "N", group = "rules")]
    pub keep_hourly: Option<u32>,
    /// The same of days.
    #[arg(long, value_name = "N", group = "rules")]
    pub keep_daily: Option<u32>,
    /// The same of weeks.
    #[arg(long, value_name = "N", group = "rules")]
    pub keep_weekly: Option<u32>,
    /// The same of months.
    #[arg(long, value_name = "N", group = "rules")]
    pub keep_monthly: Option<u32>,
    /// The same of years.
    #[arg(long, value_name = "N", group = "rules")]
    pub keep_yearly: Option<u32>,
    /// Keep all points of this time, such as 30d or 6mo.
    #[arg(long, value_name = "TIME", group = "rules")]
    pub keep_within: Option<String>,
    /// Only tell what would be forgotten.
    #[arg(long)]
    pub dry_run: bool,
    /// Make room right away, as `prune` does.
    #[arg(long, conflicts_with = "dry_run")]
    pub prune: bool,
    /// Print one JSON array.
    #[arg(long)]
    pub json: bool,
}

/// Which damaged points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Damaged {
    /// Those of which nothing can be restored.
    BeyondUse,
    /// Those too of which a part can be restored.
    Any,
}

/// `prune`.
#[derive(Debug, Args)]
pub struct Prune {
    /// Target of the configuration file (needed only if it has several).
    #[arg(long, value_name = "NAME")]
    pub target: Option<String>,
    /// Only tell what would be removed.
    #[arg(long)]
    pub dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `key`.
#[derive(Debug, Subcommand)]
pub enum Key {
    /// List keys.
    List {
        /// Target of the configuration file (needed only if it has several).
        #[arg(long, value_name = "NAME")]
        target: Option<String>,
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Add a key with another password.
    Add {
        /// Target of the configuration file (needed only if it has several).
        #[arg(long, value_name = "NAME")]
        target: Option<String>,
        /// File with the new password.
        #[arg(long, value_name = "FILE")]
        new_password_file: PathBuf,
    },
    /// Remove a key; its password opens the repository no more.
    Remove {
        /// Target of the configuration file (needed only if it has several).
        #[arg(long, value_name = "NAME")]
        target: Option<String>,
        /// The key's name, or how it begins.
        key: String,
    },
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// VMs of the configuration file; all if none is given.
    pub vms: Vec<VmName>,
    /// Monitor socket of a VM that is in no configuration file.
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    #[command(flatten)]
    pub place: Where,
}

/// `bitmaps`.
#[derive(Debug, Subcommand)]
pub enum Bitmaps {
    /// List them: disk, target, point, what each marks as changed, and whether its target is there.
    List {
        #[command(flatten)]
        of: OneVm,
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Remove them; the next point in their targets is a full one. Needed before a VM goes back to an internal snapshot.
    #[command(group = clap::ArgGroup::new("which").required(true).args(["target", "to", "gone", "all"]))]
    Remove {
        #[command(flatten)]
        of: OneVm,
        #[command(flatten)]
        place: Where,
        /// Those of targets that are neither in the configuration file nor where this host has seen them.
        #[arg(long)]
        gone: bool,
        /// All of Stillpoint's. Nobody else's are touched.
        #[arg(long)]
        all: bool,
    },
}

/// A VM, by its name or its monitor.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("one-vm").required(true).args(["vm", "qmp"]))]
pub struct OneVm {
    /// A VM of the configuration file.
    pub vm: Option<VmName>,
    /// Monitor socket of the VM.
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
}

/// `recover`.
#[derive(Debug, Args)]
pub struct Recover {
    /// A VM of the configuration file.
    #[arg(required_unless_present = "qmp", conflicts_with = "qmp")]
    pub vm: Option<VmName>,
    /// Monitor socket of the VM.
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
}

/// `target`.
#[derive(Debug, Subcommand)]
pub enum Target {
    /// Make a target: the repository of a target of the configuration file, or a directory that is empty or new. A directory also becomes
    /// a target by the first backup, but only here where one was before.
    Init {
        /// A target of the configuration file.
        #[arg(required_unless_present = "to", conflicts_with = "to")]
        name: Option<String>,
        /// A directory, instead of a target of the configuration file.
        #[arg(long, value_name = "DIRECTORY")]
        to: Option<PathBuf>,
    },
}

#[cfg(test)]
mod test {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_point_is_a_vm_and_an_id() {
        let id = "20261123T162855Z-00000001";
        assert!(matches!("web01/latest".parse().unwrap(), PointName::LatestOf(_)));
        assert!(matches!(format!("web01/{id}").parse().unwrap(), PointName::Of(..)));
        assert!(matches!(id.parse().unwrap(), PointName::Alone(_)));
        for bad in ["web01", "../x/latest", "web01/../latest", "web01/x", "/latest", "a\0b/latest"] {
            assert!(bad.parse::<PointName>().is_err(), "{bad:?}");
        }
    }
}

/// `provider`.
#[derive(Debug, Subcommand)]
pub enum Provider {
    /// Put a provider program through everything that happens to providers, and tell what is wrong with it.
    Check(ProviderCheck),
    /// Print the JSON Schema of the protocol.
    Schema,
}

/// `provider check`.
#[derive(Debug, Args)]
pub struct ProviderCheck {
    /// What the program is told as its options, as a JSON object.
    #[arg(long, value_name = "JSON", default_value = "{}")]
    pub options: String,
    /// How it gets its disks, whatever it would like: nbd, file-handle or block-device.
    #[arg(long, value_name = "MECHANISM")]
    pub mechanism: Option<String>,
    /// Add to the program's environment.
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// The program and its arguments. Give it a target without points that matter: those of the checks stay there.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    pub program: Vec<std::ffi::OsString>,
}
