//! Whether a program is a right provider: it is put through what happens to providers, with disks in memory.
//!
//! Every check begins a run of the program of its own. All points are of a VM whose name nobody else has, so a target with
//! other points in it is not harmed, but the points of the checks stay in it.

mod scripted;

use crate::{
    protocol::{Capability, Mechanism},
    provider::{ProgramProvider, Settings},
};
use scripted::{Behaviour, ScriptedDisk};
use std::{sync::Arc, time::Duration};
use stillpoint_model::{DiskName, Granularity, Length, Offset, PointId, Range, VmName};
use stillpoint_provider::{
    BitmapMode, ConfigFile, ConfigRole, Consistency, DiskOffer, DiskRecord, Incremental, OfferedBitmap,
    PointRecord, Provider as _, Volume,
};

/// What came of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Passed,
    /// Not, and why.
    Failed(String),
    /// The program does not claim to be able to do this.
    NotClaimed,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What was checked.
    pub what: &'static str,
    /// What came of it.
    pub verdict: Verdict,
}

type Checked = Result<Verdict, String>;

/// A VM whose disks are in memory, and the points that were made of it.
struct Checks {
    settings: Settings,
    vm: VmName,
    disks: Vec<(DiskName, Vec<u8>)>,
    config: Vec<ConfigFile>,
    points: Vec<Made>,
    count: u32,
    capabilities: Vec<Capability>,
}

/// A point that was made, and what it has to give back.
struct Made {
    id: PointId,
    contents: Vec<Vec<u8>>,
    config: Vec<ConfigFile>,
}

/// Sizes that are no whole number of anything.
const SIZES: [(&str, usize); 2] = [("vda", (3 << 20) + 512), ("vdb", (1 << 20) - 512)];
const PIECE: usize = 64 << 10;
const CANCEL_WITHIN: Duration = Duration::from_secs(20);

/// Puts the program through all checks; tells each as it ends.
pub async fn check(settings: &Settings, mut tell: impl FnMut(&Outcome)) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    let mut checks = match Checks::begin(settings).await {
        Ok(checks) => {
            outcomes.push(Outcome { what: "greets in the right form", verdict: Verdict::Passed });
            checks
        }
        Err(why) => {
            let outcome = Outcome { what: "greets in the right form", verdict: Verdict::Failed(why) };
            tell(&outcome);
            return vec![outcome];
        }
    };
    outcomes.iter().for_each(&mut tell);
    macro_rules! check {
        ($($what:literal: $name:ident;)*) => {
            $(
                let verdict = checks.$name().await.unwrap_or_else(Verdict::Failed);
                let outcome = Outcome { what: $what, verdict };
                tell(&outcome);
                outcomes.push(outcome);
            )*
        };
    }
    check! {
        "its target has one identity": identity;
        "makes a full point of two disks of odd sizes": full;
        "gives a full point back": restore_last;
        "lists nothing before the commit": nothing_before_the_commit;
        "makes an increment, and reads only what changed": increment;
        "gives an increment back, zeroes where there was data": restore_last;
        "leaves earlier points as they were": restore_all;
        "wants all of a disk whose generation it does not hold": foreign_generation;
        "wants all of a disk of another size": another_size;
        "goes on from an earlier point after a run without a commit": after_no_commit;
        "fails when a disk cannot be read, and lists nothing": failing_disk;
        "ends when it is cancelled, and lists nothing": cancelled;
        "takes its time with a slow disk": slow_disk;
        "takes a configuration file of 4 MiB": large_configuration;
        "is killed in the middle, and earlier points are good": killed;
        "is killed after a commit, and the point is good": killed_after_commit;
        "finds its points right (verify)": verify;
        "says that there is no such point": no_such_point;
        "answers an unknown request with an error": unknown_request;
        "ends when its standard input ends": ends;
        "gives all points back at last": restore_all;
    }
    outcomes
}

fn text(error: stillpoint_provider::Error) -> String {
    crate::rpc::chain(&error)
}

fn require(holds: bool, otherwise: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

impl Checks {
    async fn begin(settings: &Settings) -> Result<Self, String> {
        let mut random = [0u8; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| e.to_string())?;
        let vm = format!("check-{:08x}", u32::from_ne_bytes(random));
        let name = |name: &str| name.parse::<DiskName>().map_err(|error| error.to_string());
        let disk = |(disk, size): &(&str, usize)| Ok((name(disk)?, vec![0; *size]));
        let config = |file: &str, role, content: &[u8]| {
            Ok::<_, String>(ConfigFile { name: name(file)?, role, content: content.to_vec() })
        };
        let mut checks = Self {
            settings: settings.clone(),
            vm: vm.parse().map_err(|error: stillpoint_model::NameError| error.to_string())?,
            disks: SIZES.iter().map(disk).collect::<Result<_, String>>()?,
            config: vec![
                config("vm.conf", ConfigRole::Guest, b"cores: 2\n\0\xff")?,
                config("vm.fw", ConfigRole::Firewall, b"")?,
            ],
            points: Vec::new(),
            count: u32::from_ne_bytes(random),
            capabilities: Vec::new(),
        };
        checks.write(0, 0, 700 << 10, 1);
        checks.write(1, 100, (1 << 20) - 612, 2);
        let provider = checks.provider();
        let hello = provider.capabilities().await;
        provider.end().await;
        checks.capabilities = hello.map_err(text)?;
        Ok(checks)
    }

    fn provider(&self) -> ProgramProvider {
        ProgramProvider::new(self.settings.clone())
    }

    fn can(&self, capability: Capability) -> bool {
        self.capabilities.contains(&capability)
    }

    /// Fills a part of a disk with bytes that are different everywhere.
    fn write(&mut self, disk: usize, start: usize, length: usize, seed: u8) {
        let Some((_, content)) = self.disks.get_mut(disk) else { return };
        let end = (start + length).min(content.len());
        for (at, byte) in content.iter_mut().enumerate().take(end).skip(start) {
            *byte = (at / 512 % 251).to_le_bytes().first().copied().unwrap_or(0).wrapping_add(seed) | 1;
        }
    }

    fn zero(&mut self, disk: usize, start: usize, length: usize) {
        let Some((_, content)) = self.disks.get_mut(disk) else { return };
        if let Some(part) = content.get_mut(start..start + length) {
            part.fill(0);
        }
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|(_, content)| content.clone()).collect()
    }

    fn made(&mut self, id: &PointId) {
        let made = Made { id: id.clone(), contents: self.contents(), config: self.config.clone() };
        self.points.push(made);
    }

    fn new_point(&mut self) -> PointId {
        self.count = self.count.wrapping_add(1);
        PointId::new(jiff::Timestamp::now(), self.count)
    }

    fn offers(&self, generation: Option<&PointId>) -> Vec<DiskOffer> {
        let bitmap = |generation: &PointId| OfferedBitmap {
            generation: generation.clone(),
            granularity: Granularity::DEFAULT,
        };
        let offer = |(name, content): &(DiskName, Vec<u8>)| DiskOffer {
            name: name.clone(),
            size: Length::new(content.len() as u64),
            bitmaps: generation.map(bitmap).into_iter().collect(),
        };
        self.disks.iter().map(offer).collect()
    }

    /// What the program answers to `offers`.
    async fn ask(&mut self, offers: &[DiskOffer]) -> Result<Vec<Incremental>, String> {
        let provider = self.provider();
        provider.job_init().await.map_err(text)?;
        let point = self.new_point();
        let mut backup = provider.backup_init(&self.vm, &point).await.map_err(text)?;
        let answers = backup.backup_vm_query_incremental(offers).await.map_err(text);
        backup.backup_cleanup().await.map_err(text)?;
        provider.job_cleanup().await.map_err(text)?;
        answers
    }

    /// A whole run: an increment if there is a point and the program takes them. With `behaviour` of the disks, and
    /// ended before the commit if `commit` is not set.
    async fn run(&mut self, behaviour: Behaviour, commit: bool) -> Result<PointId, String> {
        let provider = self.provider();
        let point = self.new_point();
        let done = self.run_with(&provider, &point, behaviour, commit).await;
        let cleaned = provider.job_cleanup().await;
        done?;
        cleaned.map_err(text)?;
        if commit {
            self.made(&point);
        }
        Ok(point)
    }

    async fn run_with(
        &self,
        provider: &ProgramProvider,
        point: &PointId,
        behaviour: Behaviour,
        commit: bool,
    ) -> Result<(), String> {
        provider.job_init().await.map_err(text)?;
        let mut backup = provider.backup_init(&self.vm, point).await.map_err(text)?;
        let base = self.points.last().filter(|_| self.can(Capability::Incremental));
        let offers = self.offers(base.map(|made| &made.id));
        let made = async {
            let answers = backup.backup_vm_query_incremental(&offers).await.map_err(text)?;
            require(answers.len() == offers.len(), "it does not answer for each disk")?;
            let mut volumes = Vec::new();
            for (index, ((name, content), answer)) in self.disks.iter().zip(&answers).enumerate() {
                let since = match answer {
                    Incremental::Since(generation) => {
                        let offered = base.filter(|made| made.id == *generation);
                        let made = offered.ok_or("it answers with a generation that was not offered")?;
                        made.contents.get(index)
                    }
                    Incremental::Full { .. } => None,
                };
                volumes.push(Volume {
                    name: name.clone(),
                    bitmap_mode: if since.is_some() { BitmapMode::Reuse } else { BitmapMode::New },
                    base: since.and(base).map(|made| made.id.clone()),
                    source: Arc::new(ScriptedDisk::new(content, since.map(Vec::as_slice), behaviour)),
                });
            }
            let records: Vec<_> = volumes.iter().map(disk_record).collect();
            backup.backup_vm(&self.config, volumes).await.map_err(text)?;
            if !commit {
                return Ok(());
            }
            backup.commit(&self.record(point, records)).await.map_err(text)
        };
        let made = made.await;
        let cleaned = backup.backup_cleanup().await.map_err(text);
        made?;
        cleaned
    }

    fn record(&self, point: &PointId, disks: Vec<DiskRecord>) -> PointRecord {
        PointRecord {
            vm: self.vm.clone(),
            id: point.clone(),
            time: "2026-01-01T00:00:00.000Z".into(),
            consistency: Consistency::CrashConsistent,
            consistency_reason: "there is no guest".into(),
            pause_ms: 0.5,
            qemu_version: "none".into(),
            stillpoint_version: env!("CARGO_PKG_VERSION").into(),
            skipped: Vec::new(),
            disks,
        }
    }

    async fn listed(&self) -> Result<Vec<PointId>, String> {
        let provider = self.provider();
        let points = provider.points(Some(&self.vm)).await.map_err(text);
        provider.end().await;
        Ok(points?.into_iter().map(|point| point.id).collect())
    }

    /// Exactly the points that were made are listed.
    async fn listed_are_those_made(&self) -> Result<(), String> {
        if !self.can(Capability::Points) {
            return Ok(());
        }
        let (listed, made) =
            (self.listed().await?, self.points.iter().map(|made| made.id.clone()).collect::<Vec<_>>());
        require(listed == made, format!("it lists {} points of {}", listed.len(), made.len()))
    }

    async fn restore(&self, made: &Made) -> Result<(), String> {
        let point = &made.id;
        let provider = self.provider();
        let restored = async {
            let restore = provider.restore_vm_init(&self.vm, point).await.map_err(text)?;
            let mut config = restore.config().await.map_err(text)?;
            config.sort_by(|one, other| one.name.cmp(&other.name));
            require(config == made.config, "the configuration files are not what was stored")?;
            for ((name, _), wanted) in self.disks.iter().zip(&made.contents) {
                let volume = restore.volume(name).await.map_err(text)?;
                let mut found = vec![0; wanted.len()];
                let mut at = 0;
                while at < wanted.len() {
                    let extents = volume.regions(Offset::new(at as u64)).await.map_err(text)?;
                    let extent = extents.first().ok_or("the map ends")?;
                    let length =
                        usize::try_from(extent.range.length().get()).unwrap_or(usize::MAX).min(1 << 20);
                    if extent.kind == stillpoint_model::ExtentKind::Data {
                        let range = Range::new(Offset::new(at as u64), Length::new(length as u64));
                        let bytes = volume.read(range.map_err(|e| e.to_string())?).await.map_err(text)?;
                        if let Some(part) = found.get_mut(at..at + length) {
                            part.copy_from_slice(&bytes);
                        }
                    }
                    at += length;
                }
                let wrong = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
                if let Some(at) = wrong {
                    return Err(format!("disk {name} of {point} is not what was stored, at {at}"));
                }
                drop(volume);
                restore.volume_cleanup(name).await;
            }
            restore.cleanup().await;
            Ok(())
        };
        let restored = restored.await;
        provider.end().await;
        restored
    }

    async fn identity(&mut self) -> Checked {
        let mut seen = Vec::new();
        for _ in 0..2 {
            let provider = self.provider();
            seen.push(provider.job_init().await.map_err(text)?);
            provider.job_cleanup().await.map_err(text)?;
        }
        require(seen.first() == seen.last(), format!("it is {seen:?}"))?;
        Ok(Verdict::Passed)
    }

    async fn full(&mut self) -> Checked {
        self.run(Behaviour::Good, true).await?;
        self.listed_are_those_made().await?;
        Ok(Verdict::Passed)
    }

    async fn nothing_before_the_commit(&mut self) -> Checked {
        self.run(Behaviour::Good, false).await?;
        if !self.can(Capability::Points) {
            return Ok(Verdict::NotClaimed);
        }
        self.listed_are_those_made().await?;
        Ok(Verdict::Passed)
    }

    async fn increment(&mut self) -> Checked {
        if !self.can(Capability::Incremental) {
            return Ok(Verdict::NotClaimed);
        }
        self.write(0, 5 * PIECE, PIECE, 9);
        self.write(0, (3 << 20) + 100, 412, 9);
        self.zero(0, 0, 2 * PIECE);
        let last = self.points.last().map(|made| made.id.clone());
        let answers = self.ask(&self.offers(last.as_ref())).await?;
        let all = answers.iter().all(|answer| matches!(answer, Incremental::Since(_)));
        require(all, "it wants all of a disk whose generation it holds")?;
        self.run(Behaviour::Good, true).await?;
        self.listed_are_those_made().await?;
        Ok(Verdict::Passed)
    }

    async fn restore_last(&mut self) -> Checked {
        if !self.can(Capability::Restore) {
            return Ok(Verdict::NotClaimed);
        }
        self.restore(self.points.last().ok_or("no point was made")?).await?;
        Ok(Verdict::Passed)
    }

    async fn restore_all(&mut self) -> Checked {
        if !self.can(Capability::Restore) {
            return Ok(Verdict::NotClaimed);
        }
        for made in &self.points {
            self.restore(made).await?;
        }
        require(!self.points.is_empty(), "no point was made")?;
        Ok(Verdict::Passed)
    }

    async fn foreign_generation(&mut self) -> Checked {
        if !self.can(Capability::Incremental) {
            return Ok(Verdict::NotClaimed);
        }
        let foreign = self.new_point();
        let answers = self.ask(&self.offers(Some(&foreign))).await?;
        let all = answers.iter().all(|answer| matches!(answer, Incremental::Full { .. }));
        require(all, "it says that it holds a point that it was never given")?;
        Ok(Verdict::Passed)
    }

    async fn another_size(&mut self) -> Checked {
        if !self.can(Capability::Incremental) {
            return Ok(Verdict::NotClaimed);
        }
        let last = self.points.last().map(|made| made.id.clone());
        let mut offers = self.offers(last.as_ref());
        for offer in &mut offers {
            offer.size = offer.size.saturating_add(Length::new(512));
        }
        let answers = self.ask(&offers).await?;
        let all = answers.iter().all(|answer| matches!(answer, Incremental::Full { .. }));
        require(all, "it takes an increment to a disk that has grown")?;
        Ok(Verdict::Passed)
    }

    async fn after_no_commit(&mut self) -> Checked {
        self.write(1, 3 * PIECE, 10 * PIECE, 20);
        self.run(Behaviour::Good, false).await?;
        self.write(0, 7 * PIECE, PIECE, 21);
        self.run(Behaviour::Good, true).await?;
        self.listed_are_those_made().await?;
        self.restore_last().await
    }

    async fn failing_disk(&mut self) -> Checked {
        self.write(0, 2 << 20, 3 * PIECE, 30);
        require(
            self.run(Behaviour::Fails, true).await.is_err(),
            "it makes a point of a disk that cannot be read",
        )?;
        self.listed_are_those_made().await?;
        Ok(Verdict::Passed)
    }

    async fn cancelled(&mut self) -> Checked {
        self.write(0, 2 << 20, 4 * PIECE, 31);
        let started = std::time::Instant::now();
        require(
            self.run(Behaviour::Cancelled, true).await.is_err(),
            "it makes a point of a run that is cancelled",
        )?;
        require(started.elapsed() < CANCEL_WITHIN, format!("it takes {:?} to end", started.elapsed()))?;
        self.listed_are_those_made().await?;
        Ok(Verdict::Passed)
    }

    async fn slow_disk(&mut self) -> Checked {
        self.run(Behaviour::Slow, true).await?;
        self.listed_are_those_made().await?;
        self.restore_last().await
    }

    async fn large_configuration(&mut self) -> Checked {
        if let Some(file) = self.config.first_mut() {
            file.content = (0..4 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
        }
        self.run(Behaviour::Good, true).await?;
        self.restore_last().await
    }

    async fn killed(&mut self) -> Checked {
        self.write(1, 0, 2 * PIECE, 40);
        let provider = self.provider();
        let point = self.new_point();
        let died = {
            let run = self.run_with(&provider, &point, Behaviour::Slow, true);
            tokio::select! {
                done = run => done,
                () = async { tokio::time::sleep(Duration::from_millis(300)).await; provider.kill().await } => Err("killed".into()),
            }
        };
        drop(provider);
        if died.is_ok() {
            self.made(&point);
        }
        self.run(Behaviour::Good, true).await?;
        self.restore_all().await
    }

    async fn killed_after_commit(&mut self) -> Checked {
        self.write(1, 0, 2 * PIECE, 50);
        let provider = self.provider();
        let point = self.new_point();
        provider.job_init().await.map_err(text)?;
        let mut backup = provider.backup_init(&self.vm, &point).await.map_err(text)?;
        let volume = |(name, content): &(DiskName, Vec<u8>)| Volume {
            name: name.clone(),
            bitmap_mode: BitmapMode::New,
            base: None,
            source: Arc::new(ScriptedDisk::new(content, None, Behaviour::Good)),
        };
        let volumes: Vec<_> = self.disks.iter().map(volume).collect();
        let records = volumes.iter().map(disk_record).collect();
        backup.backup_vm_query_incremental(&self.offers(None)).await.map_err(text)?;
        backup.backup_vm(&self.config, volumes).await.map_err(text)?;
        backup.commit(&self.record(&point, records)).await.map_err(text)?;
        provider.kill().await;
        drop(backup);
        self.made(&point);
        self.restore_last().await
    }

    async fn verify(&mut self) -> Checked {
        if !self.can(Capability::Verify) {
            return Ok(Verdict::NotClaimed);
        }
        let provider = self.provider();
        let last = self.points.last().ok_or("no point was made")?;
        let report = provider.verify(&self.vm, &last.id, Arc::new(Silent)).await.map_err(text);
        provider.end().await;
        let report = report?;
        require(report.findings.is_empty(), format!("it finds {:?}", report.findings.first()))?;
        Ok(Verdict::Passed)
    }

    async fn no_such_point(&mut self) -> Checked {
        if !self.can(Capability::Restore) {
            return Ok(Verdict::NotClaimed);
        }
        let provider = self.provider();
        let point = self.new_point();
        let opened = provider.restore_vm_init(&self.vm, &point).await.map(|_| ());
        provider.end().await;
        require(opened.is_err(), "it opens a point that does not exist")?;
        Ok(Verdict::Passed)
    }

    async fn unknown_request(&mut self) -> Checked {
        let provider = self.provider();
        let answer = provider.unknown_request().await;
        let alive = provider.job_init().await;
        provider.end().await;
        require(answer, "it does not answer with an error")?;
        alive.map_err(text)?;
        Ok(Verdict::Passed)
    }

    async fn ends(&mut self) -> Checked {
        let provider = self.provider();
        provider.job_init().await.map_err(text)?;
        require(provider.ends().await.map_err(text)?, "it has to be killed")?;
        Ok(Verdict::Passed)
    }
}

struct Silent;

impl stillpoint_provider::Progress for Silent {
    fn total(&self, _bytes: Length) {}
    fn advanced(&self, _bytes: Length) {}
}

fn disk_record(volume: &Volume) -> DiskRecord {
    DiskRecord {
        name: volume.name.clone(),
        size: volume.source.size(),
        format: "raw".into(),
        bitmap_mode: volume.bitmap_mode,
        base: volume.base.clone(),
        reason: "checked".into(),
        granularity: Some(Granularity::DEFAULT),
        image: None,
    }
}

/// The mechanisms by their names, for the command line.
pub fn mechanism(name: &str) -> Option<Mechanism> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).ok()
}
