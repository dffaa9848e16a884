//! The contract, spoken with a program.

use crate::{
    mechanism::Handover,
    process::{Process, Program},
    protocol::{
        self, BackupVm, Capability, Hello, JobCleanup, JobInit, Mechanism, PROTOCOL, WireConfigFile,
        WireVolume,
    },
    restore::ProgramRestore,
    rpc::{Activity, Asked, Handler, Peer},
    volume::{Pace, ServedVolume},
};
use async_trait::async_trait;
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use stillpoint_model::{DiskName, PointId, Range, TargetId, VmName};
use stillpoint_provider::{
    Backup, ConfigFile, DiskOffer, Error, ErrorKind, Incremental, PointRecord, PointSummary, Progress,
    Provider, Restore, Result, VerifyReport, Volume, VolumeReport,
};
use tokio::io::BufReader;

/// How long a program may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// To answer what needs no bulk of data.
    pub answer: Duration,
    /// To make a point durable or take away what was stored for it, to look at earlier points, to open one.
    pub commit: Duration,
    /// Without reading or saying anything, while it has the disks.
    pub quiet: Duration,
    /// To end by itself when it is told to.
    pub grace: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(60),
            commit: Duration::from_secs(600),
            quiet: Duration::from_secs(300),
            grace: Duration::from_secs(5),
        }
    }
}

/// A program and how to run it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// What is in its environment beside the little that every program gets.
    pub environment: BTreeMap<String, String>,
    /// Told it in `hello`.
    pub options: Map<String, Value>,
    /// Most bytes a second that it may read, all disks together.
    pub bandwidth_limit: Option<u64>,
    /// How long it may take.
    pub deadlines: Deadlines,
    /// Where sockets and mounts go; private to this user.
    pub runtime_directory: PathBuf,
    /// The mechanism to use instead of the one that the program asks for; for checking programs.
    pub mechanism: Option<Mechanism>,
}

/// A provider that is a program. It is started when it is first needed, and ended with the job or with this.
pub struct ProgramProvider {
    settings: Settings,
    session: tokio::sync::Mutex<Option<Arc<Session>>>,
}

impl ProgramProvider {
    /// A provider that is run as `settings` say.
    pub fn new(settings: Settings) -> Self {
        Self { settings, session: tokio::sync::Mutex::new(None) }
    }

    async fn session(&self) -> Result<Arc<Session>> {
        let mut session = self.session.lock().await;
        if let Some(session) = &*session {
            return Ok(Arc::clone(session));
        }
        let started = Session::start(&self.settings).await?;
        Ok(Arc::clone(session.insert(started)))
    }

    /// What the program says that it can do.
    pub(crate) async fn capabilities(&self) -> Result<Vec<Capability>> {
        Ok(self.session().await?.capabilities.clone())
    }

    /// Kills the program, as its crash would.
    pub(crate) async fn kill(&self) {
        let Some(session) = self.session.lock().await.take() else { return };
        let process = session.process.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(process) = process {
            process.end(Duration::ZERO).await;
        }
        session.peer.end("was killed");
    }

    /// Whether it answers what it cannot know with an error.
    pub(crate) async fn unknown_request(&self) -> bool {
        let Ok(session) = self.session().await else { return false };
        let answer = session.peer.call(&protocol::Unknown {}, self.settings.deadlines.answer).await;
        answer.is_err_and(|error| crate::rpc::is_told(&error))
    }

    /// Whether it ends by itself when its standard input does.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) async fn ends(&self) -> Result<bool> {
        let session = self.session().await?;
        session.peer.close().await;
        let process = session.process.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(process) = process else { return Ok(false) };
        let status = process.end(self.settings.deadlines.grace).await;
        self.end().await;
        Ok(status.is_some())
    }

    /// Ends the program, if it runs. The next call starts it again.
    pub async fn end(&self) {
        if let Some(session) = self.session.lock().await.take() {
            session.end().await;
        }
    }
}

/// One run of the program.
pub(crate) struct Session {
    pub(crate) peer: Arc<Peer>,
    pub(crate) name: String,
    pub(crate) settings: Settings,
    mechanism: Mechanism,
    capabilities: Vec<Capability>,
    volumes: Arc<Volumes>,
    activity: Activity,
    process: Mutex<Option<Process>>,
}

/// The disks that the program has, for what it asks about them.
#[derive(Default)]
struct Volumes(Mutex<BTreeMap<DiskName, Arc<ServedVolume>>>);

impl Volumes {
    fn set(&self, volumes: &[Arc<ServedVolume>]) {
        let all = volumes.iter().map(|volume| (volume.name.clone(), Arc::clone(volume)));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = all.collect();
    }

    fn get(&self, name: &DiskName) -> Result<Arc<ServedVolume>> {
        let volumes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let volume = volumes.get(name).cloned();
        volume.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("disk {name} is not yours now")))
    }
}

#[async_trait]
impl Handler for Volumes {
    async fn answer(&self, method: &str, params: Value) -> Result<Value> {
        let value = |answer: serde_json::Result<Value>| {
            answer.map_err(|error| Error::new(ErrorKind::Io, "an answer").because(error))
        };
        match Asked::parse(method, params)? {
            Asked::Regions(asked) => {
                let regions = self.get(&asked.volume)?.dirty_regions(asked.from)?;
                value(serde_json::to_value(regions))
            }
            Asked::Release(asked) => {
                let volume = self.get(&asked.volume)?;
                let range = Range::new(asked.offset, asked.length).ok();
                let range = range.filter(|range| range.end().get() <= volume.size().get());
                let outside = || Error::new(ErrorKind::InvalidInput, "beyond the end of the disk");
                let range = range.ok_or_else(outside)?;
                if range.length().get() > 0 {
                    volume.release(range).await?;
                }
                value(serde_json::to_value(protocol::Done {}))
            }
        }
    }
}

impl Session {
    async fn start(settings: &Settings) -> Result<Arc<Self>> {
        let program = settings.program.display().to_string();
        let failed = |error: std::io::Error| {
            let failed = |kind| Error::new(kind, format!("cannot start provider {program}"));
            match error.kind() {
                std::io::ErrorKind::NotFound => failed(ErrorKind::InvalidInput)
                    .next("install the provider, or correct `program` in the configuration file"),
                std::io::ErrorKind::PermissionDenied => {
                    failed(ErrorKind::InvalidInput).next(format!("chmod +x {program}"))
                }
                _ => failed(ErrorKind::Io),
            }
            .because(error)
        };
        crate::process::sweep(&settings.runtime_directory);
        let run = Program {
            path: settings.program.clone(),
            arguments: settings.arguments.clone(),
            environment: settings.environment.clone(),
        };
        let started = Process::start(&run, &settings.runtime_directory, &program);
        let (process, stdin, stdout) = started.map_err(failed)?;
        let activity = Activity::new();
        let name = format!("provider {program}");
        let peer = Peer::new(name, stdin, activity.clone());
        let volumes = Arc::new(Volumes::default());
        let handler = Arc::clone(&volumes) as Arc<dyn Handler>;
        tokio::spawn(Arc::clone(&peer).listen(BufReader::with_capacity(64 << 10, stdout), handler));
        let mut session = Self {
            peer,
            name: program.clone(),
            settings: settings.clone(),
            mechanism: Mechanism::Nbd,
            capabilities: Vec::new(),
            volumes,
            activity,
            process: Mutex::new(Some(process)),
        };
        match session.hello().await {
            Ok(()) => Ok(Arc::new(session)),
            Err(error) => {
                session.end().await;
                Err(error)
            }
        }
    }

    async fn hello(&mut self) -> Result<()> {
        let hello = Hello {
            protocol: PROTOCOL,
            stillpoint: env!("CARGO_PKG_VERSION").to_owned(),
            options: self.settings.options.clone(),
        };
        let answer = self.peer.call(&hello, self.settings.deadlines.answer).await?;
        if answer.protocol != PROTOCOL {
            let what = format!("{} speaks protocol {}, not {PROTOCOL}", self.name, answer.protocol);
            return Err(Error::new(ErrorKind::Unsupported, what)
                .next("install a version of the provider that goes with this version of Stillpoint"));
        }
        self.name = answer.name.chars().filter(|c| !c.is_control()).take(200).collect();
        self.mechanism = self.settings.mechanism.unwrap_or(answer.mechanism);
        let known = answer.capabilities.into_iter();
        self.capabilities =
            known.filter_map(|word| serde_json::from_value(Value::String(word)).ok()).collect();
        Ok(())
    }

    fn can(&self, capability: Capability) -> bool {
        self.capabilities.contains(&capability)
    }

    fn must(&self, capability: Capability, what: &str) -> Result<()> {
        if self.can(capability) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, format!("{} cannot {what}", self.name)))
    }

    fn has_ended(&self) -> bool {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    async fn end(&self) {
        self.peer.close().await;
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(process) = process {
            process.end(self.settings.deadlines.grace).await;
        }
        self.peer.end("has ended");
    }

    /// Asks and waits; on no account longer than the program is there, reads or says something now and then, and the
    /// disks can be read.
    async fn while_it_works<T>(
        &self,
        work: impl Future<Output = Result<T>>,
        volumes: &[Arc<ServedVolume>],
    ) -> Result<T> {
        let ended = async {
            let mut waiting: Vec<_> = volumes.iter().map(|volume| Box::pin(volume.ended())).collect();
            std::future::poll_fn(|context| {
                for wait in &mut waiting {
                    if let std::task::Poll::Ready(error) = wait.as_mut().poll(context) {
                        return std::task::Poll::Ready(error);
                    }
                }
                std::task::Poll::Pending
            })
            .await
        };
        let quiet = self.settings.deadlines.quiet;
        self.activity.seen();
        tokio::select! {
            biased;
            done = work => done,
            error = ended => {
                self.peer.notify("cancel", &protocol::Cancel {}).await;
                Err(error)
            }
            () = self.activity.quiet_for(quiet) => {
                let what = format!("{} has neither read nor said anything for {} s", self.name, quiet.as_secs());
                Err(Error::new(ErrorKind::Io, what))
            }
        }
    }
}

#[async_trait]
impl Provider for ProgramProvider {
    fn name(&self) -> String {
        let session = self.session.try_lock().ok();
        let session = session.as_ref().and_then(|session| session.as_ref());
        session.map_or_else(|| self.settings.program.display().to_string(), |session| session.name.clone())
    }

    async fn job_init(&self) -> Result<TargetId> {
        let session = self.session().await?;
        let answer = session.peer.call(&JobInit {}, self.settings.deadlines.answer).await;
        match answer {
            Ok(answer) => Ok(answer.target),
            Err(error) => {
                self.end().await;
                Err(error)
            }
        }
    }

    async fn job_cleanup(&self) -> Result<()> {
        let Some(session) = self.session.lock().await.clone() else { return Ok(()) };
        if session.has_ended() {
            self.end().await;
            return Ok(());
        }
        let cleaned = session.peer.call(&JobCleanup {}, self.settings.deadlines.answer).await;
        self.end().await;
        cleaned.map(|_| ())
    }

    async fn backup_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Backup>> {
        let session = self.session().await?;
        let init = protocol::BackupInit { vm: vm.clone(), point: point.clone() };
        session.peer.call(&init, self.settings.deadlines.answer).await?;
        Ok(Box::new(ProgramBackup {
            session,
            vm: vm.clone(),
            point: point.clone(),
            committed: false,
            gone: false,
        }))
    }

    async fn points(&self, vm: Option<&VmName>) -> Result<Vec<PointSummary>> {
        let session = self.session().await?;
        session.must(Capability::Points, "list its points")?;
        session.points(vm).await
    }

    async fn restore_vm_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Restore>> {
        let session = self.session().await?;
        session.must(Capability::Restore, "give points back")?;
        Ok(Box::new(ProgramRestore::open(session, vm, point).await?))
    }

    async fn verify(
        &self,
        vm: &VmName,
        point: &PointId,
        _progress: Arc<dyn Progress>,
    ) -> Result<VerifyReport> {
        let session = self.session().await?;
        session.must(Capability::Verify, "verify its points")?;
        let verify = protocol::Verify { vm: vm.clone(), point: point.clone() };
        session.while_it_works(session.peer.ask(&verify), &[]).await
    }

    async fn close(&self) {
        self.end().await;
    }
}

impl Session {
    async fn points(&self, vm: Option<&VmName>) -> Result<Vec<PointSummary>> {
        let points = protocol::Points { vm: vm.cloned() };
        let answer = self.peer.call(&points, self.settings.deadlines.answer).await?;
        // Order is told by the sequence, and a program need not know that.
        let mut points = answer.points;
        points.retain(|point| vm.is_none_or(|vm| point.vm == *vm));
        Ok(points)
    }
}

struct ProgramBackup {
    session: Arc<Session>,
    vm: VmName,
    point: PointId,
    committed: bool,
    /// It has not kept to the protocol, and is not asked again.
    gone: bool,
}

#[async_trait]
impl Backup for ProgramBackup {
    async fn backup_vm_query_incremental(&mut self, disks: &[DiskOffer]) -> Result<Vec<Incremental>> {
        if !self.session.can(Capability::Incremental) {
            let full = || Incremental::Full {
                granularity: None,
                reason: format!("{} takes no increments", self.session.name),
            };
            return Ok(disks.iter().map(|_| full()).collect());
        }
        let query = protocol::QueryIncremental { disks: disks.to_vec() };
        let answer = self.session.peer.call(&query, self.session.settings.deadlines.commit).await?;
        Ok(answer.disks)
    }

    async fn backup_vm(&mut self, config: &[ConfigFile], volumes: Vec<Volume>) -> Result<Vec<VolumeReport>> {
        let session = Arc::clone(&self.session);
        let settings = &session.settings;
        let pace = settings.bandwidth_limit.map(|limit| Arc::new(Pace::new(limit)));
        let mut served = Vec::new();
        for volume in &volumes {
            let volume = ServedVolume::new(volume, pace.clone(), session.activity.clone()).await?;
            served.push(Arc::new(volume));
        }
        let directory = {
            let process = session.process.lock().unwrap_or_else(PoisonError::into_inner);
            process.as_ref().map(|process| process.directory().to_owned())
        };
        let gone = || Error::new(ErrorKind::Io, format!("{} has ended", session.name));
        let directory = directory.ok_or_else(gone)?;
        let handover = Handover::start(session.mechanism, &directory, &served).await?;
        session.volumes.set(&served);
        let wire = |(volume, served): (&Volume, &Arc<ServedVolume>)| WireVolume {
            name: volume.name.clone(),
            size: served.size(),
            bitmap_mode: volume.bitmap_mode,
            base: volume.base.clone(),
            handle: handover.handle(served),
        };
        let call = BackupVm {
            config: config.iter().map(WireConfigFile::from).collect(),
            volumes: volumes.iter().zip(&served).map(wire).collect(),
            bandwidth_limit: settings.bandwidth_limit,
        };
        let answered = session.while_it_works(session.peer.ask(&call), &served).await;
        let stored = match answered {
            Ok(answer) => self.check(answer.volumes, &served),
            Err(error) => Err(error),
        };
        // A program that is still at it has to go before its disks do.
        self.gone = stored.is_err();
        if self.gone {
            let own = served.iter().find_map(|volume| volume.failure());
            if !matches!(stored, Err(ref error) if error.kind() == ErrorKind::Cancelled) {
                session.peer.notify("cancel", &protocol::Cancel {}).await;
            }
            session.volumes.set(&[]);
            handover.end().await;
            // What the disk itself said is the cause of whatever the program makes of it.
            return match own {
                Some(own) if own.kind() != ErrorKind::Io => Err(own),
                _ => stored,
            };
        }
        session.volumes.set(&[]);
        handover.end().await;
        stored
    }

    async fn commit(&mut self, record: &PointRecord) -> Result<()> {
        let unknown = |error: Error| {
            Error::new(ErrorKind::CommitUnknown, "whether the point was made is not known").because(error)
        };
        let session = &self.session;
        let commit = protocol::Commit { record: record.clone() };
        match tokio::time::timeout(session.settings.deadlines.commit, session.peer.ask(&commit)).await {
            Ok(Ok(_)) => {}
            // Its own word is as good as any: it says what kind of failure it was.
            Ok(Err(error)) if crate::rpc::is_told(&error) => return Err(error),
            Ok(Err(error)) => {
                self.gone = true;
                return Err(unknown(error));
            }
            Err(_) => {
                self.gone = true;
                let limit = session.settings.deadlines.commit.as_secs();
                let what = format!("{} does not answer commit within {limit} s", session.name);
                return Err(unknown(Error::new(ErrorKind::Io, what)));
            }
        }
        self.committed = true;
        if session.can(Capability::Points) {
            let listed = session.points(Some(&self.vm)).await.map_err(unknown)?;
            if !listed.iter().any(|point| point.id == self.point && point.damage.is_none()) {
                let what = format!("{} says that the point is durable, but does not list it", session.name);
                return Err(Error::new(ErrorKind::CommitUnknown, what));
            }
        }
        Ok(())
    }

    async fn backup_cleanup(&mut self) -> Result<()> {
        let deadlines = self.session.settings.deadlines;
        // One that is hung is not waited for as one that works.
        let deadline = if self.gone { deadlines.grace } else { deadlines.commit };
        let cleaned = self.session.peer.call(&protocol::BackupCleanup {}, deadline).await;
        if self.gone {
            self.session.end().await;
        }
        cleaned.map(|_| ())
    }
}

impl ProgramBackup {
    fn check(&self, reports: Vec<VolumeReport>, served: &[Arc<ServedVolume>]) -> Result<Vec<VolumeReport>> {
        for volume in served {
            volume.prove_read()?;
        }
        let of = |volume: &Arc<ServedVolume>| {
            let report = reports.iter().find(|report| report.name == volume.name).cloned();
            report.ok_or_else(|| {
                Error::new(
                    ErrorKind::Io,
                    format!("{} does not report on disk {}", self.session.name, volume.name),
                )
            })
        };
        served.iter().map(of).collect()
    }
}
