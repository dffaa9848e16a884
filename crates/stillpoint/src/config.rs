//! The configuration file, and what stands in for it on the command line.

use crate::{
    cli::{self, Where},
    failure::{Exit, Failure},
    places::Places,
    runtime,
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};
use stillpoint_model::{DiskName, Length, VmName};
use stillpoint_provider::Provider;
use stillpoint_provider_directory::DirectoryProvider;
use stillpoint_provider_program::{Deadlines, ProgramProvider, Settings};
use stillpoint_provider_restic::{PasswordSource, ResticProvider, Settings as RepositorySettings};
use stillpoint_snapshot_access::OfflineDisk;

/// Directory of fleecing images unless configured: on disk, unlike `/tmp`, and there on every Linux.
const FLEECING_DIRECTORY: &str = "/var/tmp";
/// QEMU gives up a snapshot, never a guest's write, after this long. Windows' virtio drivers time out at 60 s.
const FLEECING_TIMEOUT: u32 = 45;
/// Seconds that an agent may take to freeze unless configured: it writes out all that its guest has cached.
const FREEZE_TIMEOUT: u64 = 60;

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// VMs by name.
    #[serde(default)]
    pub vm: BTreeMap<VmName, Vm>,
    /// Targets by name.
    #[serde(default)]
    pub target: BTreeMap<String, Target>,
}

/// A VM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Vm {
    /// Its monitor's socket.
    pub qmp: Option<PathBuf>,
    /// Its images by disk, for when it is off.
    #[serde(default)]
    pub disks: BTreeMap<DiskName, DiskImage>,
    /// Its guest agent's socket.
    pub agent: Option<PathBuf>,
    /// Seconds that the agent may take to freeze the file systems.
    #[serde(default = "freeze_timeout")]
    pub freeze_timeout: u64,
    /// Files stored raw with each point.
    #[serde(default)]
    pub config: Vec<PathBuf>,
    /// Its firewall rules, stored likewise.
    pub firewall: Option<PathBuf>,
    /// File with the state of its TPM (swtpm's `tpm2-00.permall`), stored likewise.
    pub tpm: Option<PathBuf>,
    /// Disks that are left out.
    #[serde(default)]
    pub exclude: Vec<DiskName>,
    /// Disks that the command line leaves out besides.
    #[serde(skip)]
    pub exclude_now: Vec<DiskName>,
    /// Where and how much old data is kept aside while a backup runs.
    #[serde(default)]
    pub fleecing: Fleecing,
}

impl Vm {
    /// A VM that is only known by its monitor's socket.
    pub(crate) fn at(qmp: PathBuf, agent: Option<PathBuf>) -> Self {
        Self {
            qmp: Some(qmp),
            disks: BTreeMap::new(),
            agent,
            freeze_timeout: FREEZE_TIMEOUT,
            config: Vec::new(),
            firewall: None,
            tpm: None,
            exclude: Vec::new(),
            exclude_now: Vec::new(),
            fleecing: Fleecing::default(),
        }
    }

    /// Why a disk is left out, if the user says so.
    pub(crate) fn excluded(&self, disk: &DiskName) -> Option<&'static str> {
        if self.exclude_now.contains(disk) {
            return Some("excluded by --exclude");
        }
        self.exclude.contains(disk).then_some("excluded by the configuration")
    }

    /// The disks that the user leaves out, each once.
    pub(crate) fn all_excluded(&self) -> BTreeSet<&DiskName> {
        self.exclude.iter().chain(&self.exclude_now).collect()
    }

    /// Its images, for when it is off.
    pub(crate) fn offline_disks(&self) -> Vec<OfflineDisk> {
        let disk = |(name, disk): (&DiskName, &DiskImage)| OfflineDisk {
            name: name.clone(),
            image: disk.image.clone(),
            format: disk.format.clone(),
            key_file: disk.key_file.clone(),
        };
        self.disks.iter().map(disk).collect()
    }
}

/// The image of a disk.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct DiskImage {
    /// File or block device.
    pub image: PathBuf,
    /// QEMU's name for its format. It is never guessed, since a guest decides what a raw disk looks like.
    pub format: String,
    /// File with its key, if it is encrypted (LUKS).
    pub key_file: Option<PathBuf>,
}

/// Fleecing.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fleecing {
    /// Directory of the fleecing images.
    #[serde(default = "fleecing_directory")]
    pub directory: PathBuf,
    /// Most bytes that they may take together, such as `"20GiB"`.
    #[serde(default, deserialize_with = "size")]
    pub budget: Option<Length>,
    /// Bytes that they leave free on their file system, such as `"2GiB"`, so that the guest's own writes find room; unless set,
    /// an eighth of it, 2 GiB at the most.
    #[serde(default, deserialize_with = "size")]
    pub reserve: Option<Length>,
    /// Seconds that a guest's write waits at the most for its old data to be kept aside; then the backup fails, not the
    /// write.
    #[serde(default = "fleecing_timeout", deserialize_with = "timeout")]
    pub timeout: u32,
    /// Whether old data is given back as soon as it is stored, rather than at the end.
    #[serde(default = "yes")]
    pub discard: bool,
}

impl Default for Fleecing {
    fn default() -> Self {
        Self {
            directory: fleecing_directory(),
            budget: None,
            reserve: None,
            timeout: FLEECING_TIMEOUT,
            discard: true,
        }
    }
}

fn freeze_timeout() -> u64 {
    FREEZE_TIMEOUT
}

fn fleecing_directory() -> PathBuf {
    FLEECING_DIRECTORY.into()
}

fn yes() -> bool {
    true
}

fn fleecing_timeout() -> u32 {
    FLEECING_TIMEOUT
}

/// QEMU takes 0 for no limit at all, and a guest's own limit is 30 s (Linux) or 60 s (Windows) as a rule.
fn timeout<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let seconds = u32::deserialize(deserializer)?;
    if (1..=60).contains(&seconds) {
        return Ok(seconds);
    }
    Err(serde::de::Error::custom(format!(
        "{seconds} seconds are no timeout for a guest's write; give 1 to 60"
    )))
}

fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Length>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_size(&text).map(Some).map_err(serde::de::Error::custom)
}

/// A number of bytes with an optional unit: `20GiB`, `500 MB`, `4096`.
fn parse_size(text: &str) -> Result<Length, String> {
    let wrong = || format!("{text:?} is no size; write it like \"20GiB\"");
    let digits = text.trim().find(|c: char| !c.is_ascii_digit()).unwrap_or(text.trim().len());
    let (number, unit) = text.trim().split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        "kB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(factor).map(Length::new).ok_or_else(wrong)
}

/// A target.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Target {
    provider: ProviderKind,
    /// Of the directory provider.
    directory: Option<PathBuf>,
    /// Of the restic provider: where the repository is, as restic writes it.
    repository: Option<String>,
    /// Of the restic provider: where its password is.
    password_file: Option<PathBuf>,
    /// Likewise: a program and its arguments, which prints the password.
    password_command: Option<Vec<String>>,
    /// Likewise: a variable of the environment.
    password_environment: Option<String>,
    /// Of a program: most bytes a second that it may read, such as `"100MiB"`.
    #[serde(default, deserialize_with = "size")]
    bandwidth_limit: Option<Length>,
}

/// Who keeps the points.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "a provider is \"directory\", \"restic\" or { program = \"/path\", ... }")]
enum ProviderKind {
    BuiltIn(String),
    Program(Program),
}

/// A provider outside the process.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Program {
    program: PathBuf,
    #[serde(default)]
    arguments: Vec<String>,
    /// In its environment, beside the little that every program gets.
    #[serde(default)]
    environment: BTreeMap<String, String>,
    /// Told it when it starts; what they mean is its business.
    #[serde(default)]
    options: serde_json::Map<String, serde_json::Value>,
    /// Seconds that it may take to answer.
    answer_timeout: Option<u64>,
    /// Seconds that it may take to make a point durable.
    commit_timeout: Option<u64>,
    /// Seconds without reading or saying anything, after which it is taken for hung.
    quiet_timeout: Option<u64>,
}

impl Program {
    fn settings(&self, bandwidth_limit: Option<Length>) -> Settings {
        let mut deadlines = Deadlines::default();
        let set = |deadline: &mut Duration, seconds: Option<u64>| {
            *deadline = seconds.map_or(*deadline, Duration::from_secs);
        };
        set(&mut deadlines.answer, self.answer_timeout);
        set(&mut deadlines.commit, self.commit_timeout);
        set(&mut deadlines.quiet, self.quiet_timeout);
        Settings {
            program: self.program.clone(),
            arguments: self.arguments.iter().map(Into::into).collect(),
            environment: self.environment.clone(),
            options: self.options.clone(),
            bandwidth_limit: bandwidth_limit.map(Length::get),
            deadlines,
            runtime_directory: runtime::directory(),
            mechanism: None,
        }
    }
}

impl Config {
    /// Reads `path`. Where none is named and there is none, it counts as empty, since `--qmp` and `--to` need none.
    ///
    /// # Errors
    /// If it cannot be read or is not of the right form; the message has line and column.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path == Path::new(cli::CONFIG) => {
                return Ok(Self::default());
            }
            Err(error) => {
                return Err(Failure::usage(format!("cannot read configuration {}: {error}", path.display())));
            }
        };
        toml::from_str(&text).map_err(|error| {
            // It quotes the file, which may have anything in it.
            let what = error.to_string();
            let clean = what.trim_end().replace(|c: char| c.is_control() && c != '\n', "?");
            Failure::usage(format!("configuration {}: {clean}", path.display()))
        })
    }

    /// The VM of that name.
    ///
    /// # Errors
    /// If the file has no such VM.
    pub(crate) fn vm(&self, name: &VmName, path: &Path) -> Result<&Vm, Failure> {
        self.vm.get(name).ok_or_else(|| {
            Failure::usage(format!("there is no VM {name} in {}", path.display())).next(format!(
                "add [vm.{name}] with its `qmp` socket there, or name the socket with --qmp SOCKET"
            ))
        })
    }

    /// Opens the provider of a target or of `--to`.
    ///
    /// # Errors
    /// If nothing says where, or the target is unknown.
    pub(crate) fn provider(&self, place: &Where, path: &Path) -> Result<Box<dyn Provider>, Failure> {
        if let Some(directory) = self.directory(place, path)? {
            return Ok(Box::new(directory));
        }
        let (name, target) = self.target(place.target.as_deref(), path)?;
        if target.bandwidth_limit.is_some() && !matches!(target.provider, ProviderKind::Program(_)) {
            return Err(Failure::usage(format!(
                "target {name}: `bandwidth-limit` is for providers that are programs; here it would hold nothing back"
            ))
            .next("remove it from the target"));
        }
        match &target.provider {
            ProviderKind::Program(program) => {
                let runtime = runtime::directory();
                stillpoint_snapshot_access::private_directory(&runtime).map_err(|error| {
                    Failure::because(Exit::Failed, "no place for the provider's sockets", &error)
                })?;
                Ok(Box::new(ProgramProvider::new(program.settings(target.bandwidth_limit))))
            }
            ProviderKind::BuiltIn(kind) if kind == "directory" => {
                Err(Failure::usage("a target of provider \"directory\" says no `directory`"))
            }
            ProviderKind::BuiltIn(kind) if kind == "restic" => Ok(Box::new(target.restic(name)?)),
            ProviderKind::BuiltIn(other) => Err(Failure::usage(format!(
                "target {name}: there is no provider {other:?}; there is \"directory\", \"restic\" and {{ program = \"/path\" }}"
            ))),
        }
    }

    /// Opens a target that is a directory, with what this host remembers of it; `None` if it is of another kind.
    ///
    /// # Errors
    /// If nothing says where, or the target is unknown.
    pub(crate) fn directory(&self, place: &Where, path: &Path) -> Result<Option<DirectoryProvider>, Failure> {
        let directory = match &place.to {
            Some(directory) => directory,
            None => match self.target(place.target.as_deref(), path)?.1 {
                Target {
                    provider: ProviderKind::BuiltIn(kind),
                    directory: Some(directory),
                    bandwidth_limit: None,
                    ..
                } if kind == "directory" => directory,
                _ => return Ok(None),
            },
        };
        let before = Places::of_this_host().before(directory);
        Ok(Some(DirectoryProvider::new(directory.clone()).known(before)))
    }

    /// Opens a target that is a repository, for what only those have.
    ///
    /// # Errors
    /// If it is none.
    pub(crate) fn repository(&self, target: Option<&str>, path: &Path) -> Result<ResticProvider, Failure> {
        let (name, target) = self.target(target, path)?;
        match &target.provider {
            ProviderKind::BuiltIn(kind) if kind == "restic" => target.restic(name),
            _ => Err(Failure::usage(format!(
                "target {name} is not of provider \"restic\", which alone has this"
            ))),
        }
    }

    fn target(&self, name: Option<&str>, path: &Path) -> Result<(&str, &Target), Failure> {
        let known = || self.target.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let mut all = self.target.iter().map(|(name, target)| (name.as_str(), target));
        match name {
            Some(name) => all.find(|(known, _)| *known == name).ok_or_else(|| {
                let known =
                    if self.target.is_empty() { "it has none".into() } else { format!("it has {}", known()) };
                let (name, path) = (name.escape_debug(), path.display());
                Failure::usage(format!("there is no target {name} in {path}: {known}"))
            }),
            None => match (all.next(), all.next()) {
                (Some(only), None) => Ok(only),
                (None, _) => Err(Failure::usage("nothing says where the points are kept").next(format!(
                    "name a directory with --to DIRECTORY, or add a [target.NAME] to {}",
                    path.display()
                ))),
                _ => Err(Failure::usage(format!("which target? {} has {}", path.display(), known()))
                    .next("add --target NAME")),
            },
        }
    }
}

impl Target {
    fn restic(&self, name: &str) -> Result<ResticProvider, Failure> {
        let Some(repository) = &self.repository else {
            return Err(Failure::usage(format!("target {name} of provider \"restic\" says no `repository`")));
        };
        let file = self.password_file.clone().map(PasswordSource::File);
        let command = self.password_command.clone().map(PasswordSource::Command);
        let environment = self.password_environment.clone().map(PasswordSource::Environment);
        let mut sources = [file, command, environment].into_iter().flatten();
        let (Some(password), None) = (sources.next(), sources.next()) else {
            return Err(Failure::usage(format!("target {name} needs one way to its password")).next(
                "give `password-file`, `password-command` or `password-environment`, and not two of them",
            ));
        };
        Ok(ResticProvider::new(RepositorySettings { repository: repository.clone(), password }))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_unit() {
        assert_eq!(parse_size("20GiB").unwrap(), Length::new(20 << 30));
        assert_eq!(parse_size(" 500 MB ").unwrap(), Length::new(500_000_000));
        assert_eq!(parse_size("4096").unwrap(), Length::new(4096));
        for bad in ["", "GiB", "-1", "1.5GiB", "99999999999999TiB", "20 gigs"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_file_of_the_design_is_understood_and_a_typing_error_is_not() {
        let text = r#"
            [vm.web01]
            qmp = "/run/vms/web01.qmp"
            agent = "/run/vms/web01.qga"
            config = ["/etc/vms/web01.conf"]
            firewall = "/etc/vms/web01.fw"
            tpm = "/var/lib/swtpm/web01/tpm2-00.permall"
            exclude = ["scratch"]
            disks = { vda = { image = "/var/lib/vms/web01.qcow2", format = "qcow2" } }
            fleecing = { directory = "/var/lib/stillpoint", budget = "20GiB" }
            [target.main]
            provider = "directory"
            directory = "/srv/backups"
        "#;
        let config: Config = toml::from_str(text).unwrap();
        let vm = config.vm.get("web01").unwrap();
        assert_eq!(vm.fleecing.budget, Some(Length::new(20 << 30)));
        assert!(vm.fleecing.discard, "unless it is said");
        let kept: Config = toml::from_str(&text.replace("\"20GiB\"", "\"20GiB\", discard = false")).unwrap();
        assert!(!kept.vm.get("web01").unwrap().fleecing.discard);
        assert!(toml::from_str::<Config>(&text.replace("exclude", "exlcude")).is_err());
        assert!(toml::from_str::<Config>(&text.replace("vm.web01", "vm.\"../web01\"")).is_err());
    }
}
