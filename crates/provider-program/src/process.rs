//! A program that runs for us: in a process group of its own, with an environment that we chose and no descriptors but
//! its own three, and gone with all that it started when we are done with it.
//!
//! # Crash
//! Each run of a program has a directory, with a file in it that we hold a lock on as long as we live. [`sweep`] finds
//! directories of which nobody holds the lock: what runs with their token in its environment is killed, what is mounted
//! in them is unmounted.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal},
};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader},
    net::UnixStream,
    process::{Child, ChildStdout, Command},
};

/// Marks all that a program starts.
const TOKEN: &str = "STILLPOINT_PROVIDER_RUN";
/// Directories of runs are called so.
const PREFIX: &str = "provider-";
/// Most of a program's standard error that goes to the log.
const MOST_LOG: u64 = 1 << 20;
/// Of our environment a program gets these.
const PASSED: [&str; 5] = ["HOME", "USER", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR"];
/// Longest wait for the death of what was killed; what hangs in the kernel is not waited for.
const DEATH: Duration = Duration::from_secs(2);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) environment: BTreeMap<String, String>,
}

/// One run of a program.
pub(crate) struct Process {
    child: Child,
    group: Option<Pid>,
    token: String,
    /// Sockets and mounts of this run.
    directory: TempDir,
    _owner: File,
}

impl Process {
    /// Starts it. The standard input is a socket, since a pipe that a program closes would raise SIGPIPE here.
    pub(crate) fn start(
        program: &Program,
        runtime: &Path,
        name: &str,
    ) -> io::Result<(Self, UnixStream, ChildStdout)> {
        // Recorded before it is started, so that a death in between leaves nothing that is not found.
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(runtime)?;
        let owner = File::create_new(directory.path().join("owner"))?;
        flock(&owner, FlockOperation::NonBlockingLockExclusive)?;
        let token = token(directory.path());
        close_on_exec();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new(&program.path);
        command.args(&program.arguments).env_clear().env("PATH", PATH).env("LANG", "C.UTF-8");
        command.envs(PASSED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.envs(&program.environment).env(TOKEN, &token).current_dir("/").process_group(0);
        command.stdin(std::os::fd::OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn()?;
        let group = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no standard output"))?;
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(log(name.to_owned(), stderr));
        }
        let process = Self { child, group, token, directory, _owner: owner };
        Ok((process, UnixStream::from_std(ours)?, stdout))
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Waits until it ends by itself, for at most `grace`, and then ends it; nothing that it started is left.
    pub(crate) async fn end(mut self, grace: Duration) -> Option<std::process::ExitStatus> {
        let ended = tokio::time::timeout(grace, self.child.wait()).await;
        self.kill();
        match ended {
            Ok(status) => status.ok(),
            Err(_) => {
                // Killed by now, and waited for by its own process id.
                let _ = tokio::time::timeout(Duration::from_secs(10), self.child.wait()).await;
                None
            }
        }
    }

    fn kill(&mut self) {
        if let Some(group) = self.group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        kill_by_token(&self.token);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        unmount_all(self.directory.path());
    }
}

fn token(directory: &Path) -> String {
    directory.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What we have open is not for programs that we start. Our own descriptors are so already; what we were given by
/// whoever started us may not be.
fn close_on_exec() {
    close_fds::set_fds_cloexec(3, &[]);
}

/// Everything that has the token in its environment, whatever process group it has put itself into.
fn kill_by_token(token: &str) {
    if token.is_empty() {
        return;
    }
    let mark = format!("{TOKEN}={token}\0");
    // What is forked while this looks is found the next time round.
    for _ in 0..8 {
        let mut found = false;
        let Ok(processes) = fs::read_dir("/proc") else { return };
        for entry in processes.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let Ok(environment) = fs::read(entry.path().join("environ")) else { continue };
            if environment.windows(mark.len()).any(|window| window == mark.as_bytes())
                && let Some(pid) = Pid::from_raw(pid)
            {
                found |= kill_and_wait(pid).is_ok();
            }
        }
        if !found {
            return;
        }
    }
}

/// Returns when the process is gone, and its locks with it: the next run may want them.
fn kill_and_wait(pid: Pid) -> io::Result<()> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_send_signal(&process, Signal::KILL)?;
    let gone = PollFd::new(&process, PollFlags::IN);
    let most = Timespec { tv_sec: DEATH.as_secs().cast_signed(), tv_nsec: 0 };
    poll(&mut [gone], Some(&most))?;
    Ok(())
}

fn unmount_all(directory: &Path) {
    let Ok(mounts) = fs::read_to_string("/proc/self/mounts") else { return };
    for line in mounts.lines() {
        let Some(target) = line.split(' ').nth(1).map(Path::new) else { continue };
        if target.starts_with(directory) {
            let _ = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// Clears away what programs of runs that have died left: processes, mounts, directories.
pub fn sweep(runtime: &Path) {
    let Ok(entries) = fs::read_dir(runtime) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(owner) = File::open(path.join("owner")) else { continue };
        if flock(&owner, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        kill_by_token(&token(&path));
        crate::mechanism::detach_all(&path);
        unmount_all(&path);
        let _ = fs::remove_dir_all(&path);
    }
}

/// A program's standard error, line by line, to the log under its name.
async fn log(name: String, stderr: impl AsyncRead + Unpin) {
    let mut lines = BufReader::new(stderr.take(MOST_LOG));
    loop {
        let mut line = Vec::new();
        match lines.read_until(b'\n', &mut line).await {
            Ok(1..) => {
                let text = String::from_utf8_lossy(&line);
                let text: String = text.chars().filter(|c| !c.is_control()).take(2000).collect();
                tracing::info!("{name}: {text}");
            }
            _ => break,
        }
    }
    if lines.get_ref().limit() == 0 {
        tracing::warn!(
            "{name} writes more than {MOST_LOG} bytes to its standard error; the rest is not logged"
        );
    }
    // It must not block on a full pipe.
    let mut rest = lines.into_inner().into_inner();
    let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
}
