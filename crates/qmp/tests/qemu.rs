//! The monitor's client against a real QEMU.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use serde_json::json;
use std::{
    fs,
    future::Future,
    io::Write,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Child, Command as Process, Stdio},
    time::{Duration, Instant},
};
use stillpoint_qmp::{Command, Deadlines, ErrorKind, Qmp};

const BINARY: &str = "qemu-system-x86_64";
/// QEMU has no machine here, so everything it does takes milliseconds; the rest is for a busy host.
const START: Duration = Duration::from_secs(30);

struct Qemu {
    child: Child,
    directory: tempfile::TempDir,
}

impl Qemu {
    /// A QEMU without a machine and without a CPU, with a monitor and one that prints prettily.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let monitor =
            |name: &str| format!("unix:{},server=on,wait=off", directory.path().join(name).display());
        let child = Process::new(BINARY)
            .args(["-M", "none", "-S", "-display", "none", "-nodefaults"])
            .args(["-qmp", &monitor("qmp"), "-qmp-pretty", &monitor("pretty")])
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{BINARY} is needed for this test: {error}"));
        Self { child, directory }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Process::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Connects as soon as QEMU has come so far, which nothing tells.
    async fn connect(&self, name: &str) -> Qmp {
        let begin = Instant::now();
        loop {
            match Qmp::connect(&self.path(name), Deadlines::default()).await {
                Ok(qmp) => return qmp,
                Err(error)
                    if matches!(error.kind(), ErrorKind::NoSocket | ErrorKind::Refused)
                        && begin.elapsed() < START =>
                {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("{error:?}"),
            }
        }
    }

    /// Whether a descriptor of QEMU's, or any if `number` is none, is this file.
    fn holds(&self, number: Option<u64>, file: &fs::File) -> bool {
        let wanted = file.metadata().unwrap();
        let same = |path: &Path| {
            fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
        };
        let all = PathBuf::from(format!("/proc/{}/fd", self.child.id()));
        match number {
            Some(number) => same(&all.join(number.to_string())),
            None => fs::read_dir(all).unwrap().any(|entry| same(&entry.unwrap().path())),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn done<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(2 * START, what).await.expect("nothing hangs")
}

#[tokio::test]
async fn a_real_monitor_is_understood() {
    done(async {
        let qemu = Qemu::start();
        let qmp = qemu.connect("qmp").await;
        let told = Process::new(BINARY).arg("--version").output().unwrap();
        let told = String::from_utf8(told.stdout).unwrap();
        assert!(told.contains(&format!("version {}", qmp.version())), "{} is not in {told}", qmp.version());
        assert_eq!(qmp.peer_pid(), Some(qemu.child.id()));
        let status = qmp.execute(Command::new("query-status")).await.unwrap();
        assert_eq!(status["status"], "prelaunch");
        let error = qmp
            .execute(Command::with("qom-get", json!({"path": "/nowhere", "property": "x"})))
            .await
            .unwrap_err();
        assert_eq!(error.class(), Some("DeviceNotFound"));
        let error = qmp.execute(Command::new("no-such-command")).await.unwrap_err();
        assert_eq!(error.class(), Some("CommandNotFound"));
    })
    .await;
}

#[tokio::test]
async fn a_pipeline_runs_in_order() {
    done(async {
        let qemu = Qemu::start();
        let qmp = qemu.connect("qmp").await;
        // Each object can be made only before, and removed only after, its neighbours in the list.
        let commands = (0..20)
            .map(|number| match number % 4 {
                0 => Command::with("object-add", json!({"qom-type": "iothread", "id": "t"})),
                1 => Command::with("object-add", json!({"qom-type": "iothread", "id": "t"})),
                2 => Command::with("object-del", json!({"id": "t"})),
                _ => Command::new("query-iothreads"),
            })
            .collect();
        let pipelined = qmp.pipeline(commands).await.unwrap();
        assert_eq!((pipelined.replies.len(), pipelined.done.len()), (20, 20));
        for (number, reply) in pipelined.replies.iter().enumerate() {
            match number % 4 {
                1 => assert_eq!(reply.as_ref().unwrap_err().kind(), ErrorKind::Command, "made twice"),
                3 => assert_eq!(reply.as_ref().unwrap(), &json!([])),
                _ => assert_eq!(reply.as_ref().unwrap(), &json!({})),
            }
        }
        assert!(pipelined.done.is_sorted());
        assert!(pipelined.done[0] >= pipelined.sent);
    })
    .await;
}

#[tokio::test]
async fn descriptors_arrive_as_the_files_they_are() {
    done(async {
        let qemu = Qemu::start();
        let qmp = qemu.connect("qmp").await;
        let (mut named, mut numbered) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        named.write_all(b"named").unwrap();
        numbered.write_all(b"numbered").unwrap();
        let (getfd, add_fd) = tokio::join!(
            qmp.execute_with_fd(Command::with("getfd", json!({"fdname": "ours"})), named.as_fd()),
            qmp.execute_with_fd(Command::with("add-fd", json!({"opaque": "ours"})), numbered.as_fd()),
        );
        getfd.unwrap();
        assert!(qemu.holds(add_fd.unwrap()["fd"].as_u64(), &numbered));
        assert!(qemu.holds(None, &named));
        qmp.execute(Command::with("closefd", json!({"fdname": "ours"}))).await.unwrap();
        assert!(!qemu.holds(None, &named));
        let error = qmp.execute(Command::with("getfd", json!({"fdname": "none"}))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Command, "a command without a descriptor has none to take");
    })
    .await;
}

#[tokio::test]
async fn only_one_client_is_served_and_the_next_one_after_it() {
    done(async {
        let qemu = Qemu::start();
        let first = qemu.connect("qmp").await;
        let path = qemu.path("qmp");
        let hasty = Deadlines { connect: Duration::from_millis(300), ..Deadlines::default() };
        // More than the socket's queue holds: those beyond it are refused by the kernel, not by silence.
        let others = [(); 4].map(|()| {
            let path = path.clone();
            tokio::spawn(async move { Qmp::connect(&path, hasty).await.map(|_| ()) })
        });
        for other in others {
            assert_eq!(other.await.unwrap().unwrap_err().kind(), ErrorKind::Busy);
        }
        first.execute(Command::new("query-status")).await.unwrap();
        drop(first);
        Qmp::connect(&path, Deadlines::default()).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_stopped_qemu_is_told_as_such_and_answers_again_once_it_goes_on() {
    done(async {
        let qemu = Qemu::start();
        let short = Duration::from_millis(300);
        drop(qemu.connect("qmp").await);
        let hasty = Deadlines { connect: short, command: short, grace: START };
        let qmp = Qmp::connect(&qemu.path("qmp"), hasty).await.unwrap();
        qemu.signal("STOP");
        let error = qmp.execute(Command::new("query-status")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout("query-status"));
        assert!(qmp.peer_is_stopped());
        assert_eq!(qmp.execute(Command::new("cont")).await.unwrap_err().kind(), ErrorKind::Silent);
        // More often than its queue is long: whoever gave up still stands in it.
        for _ in 0..4 {
            let error = Qmp::connect(&qemu.path("pretty"), hasty).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Stopped(qemu.child.id()), "{error}");
            assert!(error.to_string().contains(&format!("process {}", qemu.child.id())), "{error}");
        }
        qemu.signal("CONT");
        assert!(qmp.answers_again().await && !qmp.peer_is_stopped());
        let status = qmp.execute(Command::new("query-status")).await.unwrap();
        assert_eq!(status["running"], false, "the command that was refused was never sent");
    })
    .await;
}

#[tokio::test]
async fn a_monitor_that_prints_prettily_is_understood() {
    done(async {
        let qemu = Qemu::start();
        let qmp = qemu.connect("pretty").await;
        let status = qmp.execute(Command::new("query-status")).await.unwrap();
        assert_eq!(status["status"], "prelaunch");
        let empty =
            qmp.pipeline(vec![Command::new("query-block-jobs"), Command::new("query-name")]).await.unwrap();
        assert_eq!(
            empty.replies.iter().map(|reply| reply.as_ref().unwrap()).collect::<Vec<_>>(),
            [&json!([]), &json!({})]
        );
    })
    .await;
}

#[tokio::test]
async fn events_arrive_until_qemu_ends() {
    done(async {
        let mut qemu = Qemu::start();
        let qmp = qemu.connect("qmp").await;
        let mut events = qmp.events();
        let now = std::time::UNIX_EPOCH.elapsed().unwrap();
        qmp.execute(Command::new("cont")).await.unwrap();
        let resume = events.next().await.unwrap().unwrap();
        assert_eq!(resume.name, "RESUME");
        assert!(resume.timestamp.abs_diff(now) < START, "{:?} is not about {now:?}", resume.timestamp);
        assert_eq!(qmp.execute(Command::new("quit")).await.unwrap(), json!({}));
        let mut names = Vec::new();
        while let Some(event) = events.next().await {
            names.push(event.unwrap().name);
        }
        assert!(names.iter().any(|name| name == "SHUTDOWN"), "{names:?}");
        let error = qmp.execute(Command::new("query-status")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Disconnected);
        assert!(qemu.child.wait().unwrap().success());
    })
    .await;
}
