//! The messages between Stillpoint and a provider program, from the types of the contract itself.
//! `docs/provider-protocol.md` teaches them; [`schema`] is generated from here.

use base64::Engine as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use stillpoint_model::{DiskName, Generation, Length, Offset, PointId, TargetId, VmName};
use stillpoint_provider::{
    BitmapMode, ConfigFile, ConfigRole, DiskOffer, ErrorKind, Incremental, PointRecord, PointSummary,
    VerifyReport, VolumeReport,
};

/// The version of the protocol that is spoken here. A program answers `hello` with the same, or refuses.
pub const PROTOCOL: u32 = 1;
/// Most bytes of one message, its line's end included.
pub const MOST_MESSAGE: usize = 32 << 20;

/// A request, by what it carries.
pub trait Call: Serialize {
    /// The method's name.
    const METHOD: &'static str;
    /// What the answer carries.
    type Answer: DeserializeOwned;
}

macro_rules! calls {
    ($($type:ident => $method:literal, $answer:ty;)*) => {
        $(impl Call for $type {
            const METHOD: &'static str = $method;
            type Answer = $answer;
        })*

        fn calls() -> Map<String, Value> {
            let mut methods = Map::new();
            $(methods.insert($method.to_owned(), json!({
                "params": schemars::schema_for!($type),
                "result": schemars::schema_for!($answer),
            }));)*
            methods
        }
    };
}

calls! {
    Hello => "hello", HelloAnswer;
    JobInit => "job_init", JobInitAnswer;
    JobCleanup => "job_cleanup", Done;
    BackupInit => "backup_init", Done;
    QueryIncremental => "backup_vm_query_incremental", QueryIncrementalAnswer;
    BackupVm => "backup_vm", BackupVmAnswer;
    Commit => "commit", Done;
    BackupCleanup => "backup_cleanup", Done;
    Points => "points", PointsAnswer;
    RestoreInit => "restore_vm_init", RestoreInitAnswer;
    RestoreConfig => "restore_config", RestoreConfigAnswer;
    RestoreVolumeInit => "restore_vm_volume_init", RestoreVolumeAnswer;
    RestoreVolumeCleanup => "restore_vm_volume_cleanup", Done;
    RestoreCleanup => "restore_vm_cleanup", Done;
    Verify => "verify", VerifyReport;
    NextDirtyRegions => "next_dirty_regions", NextDirtyRegionsAnswer;
    Release => "release", Done;
}

/// The JSON Schema of all messages, by method.
pub fn schema() -> Value {
    let methods = calls();
    let (from_program, to_program): (Map<_, _>, Map<_, _>) =
        methods.into_iter().partition(|(name, _)| matches!(name.as_str(), "next_dirty_regions" | "release"));
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stillpoint's provider protocol",
        "protocol": PROTOCOL,
        "requests_to_program": to_program,
        "notifications_to_program": {"cancel": schemars::schema_for!(Cancel)},
        "requests_from_program": from_program,
        "notifications_from_program": {
            "log": schemars::schema_for!(Log),
            "progress": schemars::schema_for!(ProgressNote),
        },
        "error_data": schemars::schema_for!(ErrorData),
    })
}

/// Nothing more to say than that it is done.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// The first request.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Hello {
    /// Version of the protocol.
    pub protocol: u32,
    /// Version of Stillpoint.
    pub stillpoint: String,
    /// What the target's configuration says under `options`.
    pub options: Map<String, Value>,
}

/// What a program can do beyond making full points, which all can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Capability {
    /// Takes increments: `backup_vm_query_incremental` is asked.
    Incremental,
    /// Lists its points: `points`.
    Points,
    /// Gives points back: `restore_vm_init` and what follows it.
    Restore,
    /// Verifies a point: `verify`.
    Verify,
}

/// How a disk's bytes get to the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// An NBD export on a unix socket.
    Nbd,
    /// A block device.
    BlockDevice,
    /// A file.
    FileHandle,
}

/// The answer to `hello`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HelloAnswer {
    /// The version of the protocol that the program speaks.
    pub protocol: u32,
    /// What to call it in messages, such as `raw images in /srv/images`.
    pub name: String,
    /// What it can do; unknown words are left out of account.
    #[serde(default)]
    #[schemars(with = "Vec<Capability>")]
    pub capabilities: Vec<String>,
    /// How it would like its disks.
    pub mechanism: Mechanism,
}

/// Begins a job.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobInit {}

/// The answer: which target this is.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobInitAnswer {
    /// Eight hexadecimal digits, drawn when the target was made and kept in it for good: part of each bitmap's name.
    pub target: TargetId,
}

/// Ends a job, whatever came of it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobCleanup {}

/// Begins a backup.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct BackupInit {
    /// The VM.
    pub vm: VmName,
    /// The point that is going to be.
    pub point: PointId,
}

/// Asks for increments.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct QueryIncremental {
    /// The disks, with the generations that there are bitmaps for.
    pub disks: Vec<DiskOffer>,
}

/// The answer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct QueryIncrementalAnswer {
    /// One for each disk, in the same order.
    pub disks: Vec<Incremental>,
}

/// A file of the VM's configuration.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct WireConfigFile {
    /// Its name.
    pub name: DiskName,
    /// What it is.
    pub role: ConfigRole,
    /// Its bytes, in base64 (RFC 4648, with padding).
    pub content: String,
}

impl From<&ConfigFile> for WireConfigFile {
    fn from(file: &ConfigFile) -> Self {
        let content = base64::engine::general_purpose::STANDARD.encode(&file.content);
        Self { name: file.name.clone(), role: file.role, content }
    }
}

impl TryFrom<WireConfigFile> for ConfigFile {
    type Error = base64::DecodeError;

    fn try_from(file: WireConfigFile) -> Result<Self, Self::Error> {
        let content = base64::engine::general_purpose::STANDARD.decode(file.content)?;
        Ok(Self { name: file.name, role: file.role, content })
    }
}

/// Where a disk is to be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Handle {
    /// An NBD export.
    Nbd {
        /// The unix socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
        /// The map that tells dirty (flag 1) from clean (0); absent if all of the disk is to be read.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dirty_context: Option<String>,
    },
    /// A block device.
    BlockDevice {
        /// Its path.
        path: PathBuf,
    },
    /// A file.
    FileHandle {
        /// Its path.
        path: PathBuf,
    },
}

/// A disk, handed over.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct WireVolume {
    /// The disk.
    pub name: DiskName,
    /// Its size in bytes.
    pub size: Length,
    /// How its bitmap is used.
    pub bitmap_mode: BitmapMode,
    /// With `reuse`: the point that the clean parts are the same as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Generation>,
    /// Where to read it.
    pub handle: Handle,
}

/// Hands over all disks.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct BackupVm {
    /// Configuration files.
    pub config: Vec<WireConfigFile>,
    /// The disks.
    pub volumes: Vec<WireVolume>,
    /// Most bytes a second that the program may read, all disks together; it is held to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<u64>,
}

/// The answer: everything is stored, nothing is listed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct BackupVmAnswer {
    /// One for each disk.
    pub volumes: Vec<VolumeReport>,
}

/// Makes the point durable, then listed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Commit {
    /// All that is to be known of the point.
    pub record: PointRecord,
}

/// Ends a backup, committed or not.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct BackupCleanup {}

/// Asks for the points that are listed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Points {
    /// Of this VM only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
}

/// The answer, in the order in which they were made.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PointsAnswer {
    /// The points.
    pub points: Vec<PointSummary>,
}

/// Opens a point.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RestoreInit {
    /// The VM.
    pub vm: VmName,
    /// The point.
    pub point: PointId,
}

/// The answer: the record that was committed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RestoreInitAnswer {
    /// The record.
    pub record: PointRecord,
}

/// Asks for the configuration files.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RestoreConfig {}

/// The answer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RestoreConfigAnswer {
    /// The files.
    pub files: Vec<WireConfigFile>,
}

/// Opens a disk of the point.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RestoreVolumeInit {
    /// The disk.
    pub name: DiskName,
}

/// Where a disk of a point is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreVolumeAnswer {
    /// A raw image, or a device.
    Path(PathBuf),
    /// An NBD export.
    Nbd {
        /// The unix socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
}

/// The disk is not read any more.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RestoreVolumeCleanup {
    /// The disk.
    pub name: DiskName,
}

/// The point is not read any more.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RestoreCleanup {}

/// Asks the program to compare a point with what it recorded.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Verify {
    /// The VM.
    pub vm: VmName,
    /// The point.
    pub point: PointId,
}

/// A request that no version of the protocol has.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Unknown {}

impl Call for Unknown {
    const METHOD: &'static str = "no_such_method";
    type Answer = Done;
}

/// From the program: which parts of a disk have to be read.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct NextDirtyRegions {
    /// The disk.
    pub volume: DiskName,
    /// Where to go on: 0, then the `next` of the last answer.
    pub from: Offset,
}

/// A part of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WireRegion {
    /// Its first byte.
    pub offset: Offset,
    /// How long it is.
    pub length: Length,
    /// It reads as zeroes.
    #[serde(default)]
    pub zero: bool,
}

/// The answer: all dirty regions up to `next`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NextDirtyRegionsAnswer {
    /// In order. What lies between them is clean.
    pub regions: Vec<WireRegion>,
    /// Where to go on; absent at the end of the disk, and only there is the list complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Offset>,
}

/// From the program: this part is not read again, so that old data kept for it can go.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Release {
    /// The disk.
    pub volume: DiskName,
    /// The first byte.
    pub offset: Offset,
    /// How long it is.
    pub length: Length,
}

/// To the program: end what you are at; it is going to fail anyway.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Cancel {}

/// From the program: a line for the log.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Log {
    /// `error`, `warning`, `info` or `debug`.
    #[serde(default)]
    pub level: String,
    /// One line.
    pub message: String,
}

/// From the program: it is at work, though it reads nothing. Anything that it sends says so too.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ProgressNote {
    /// What it is at, for a person.
    #[serde(default)]
    pub message: String,
}

/// What an error carries as `data`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ErrorData {
    /// What to act on.
    pub kind: ErrorKind,
    /// What a person should check or type next, on one line, where the kind alone does not say it well enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_schema_is_that_of_the_documentation() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/provider-protocol.schema.json");
        let made = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
        if std::env::var_os("STILLPOINT_WRITE_SCHEMA").is_some() {
            std::fs::write(path, &made).unwrap();
        }
        let documented = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            made == documented,
            "STILLPOINT_WRITE_SCHEMA=1 cargo test -p stillpoint-provider-program schema"
        );
    }

    #[test]
    fn a_configuration_file_survives_the_way_through_json() {
        let file = ConfigFile {
            name: "vm.conf".parse().unwrap(),
            role: ConfigRole::Guest,
            content: vec![0, 255, b'\n', 7],
        };
        let text = serde_json::to_string(&WireConfigFile::from(&file)).unwrap();
        let back: WireConfigFile = serde_json::from_str(&text).unwrap();
        assert_eq!(ConfigFile::try_from(back).unwrap(), file);
    }
}
