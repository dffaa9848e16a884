//! A repository behind `rclone`, which is started for it and serves restic's REST protocol to us alone.

use super::{FIRST_ANSWER, Opening, rest::RestStore};
use crate::error::Fault;
use reqwest::Url;
use std::{
    io::{self, BufRead as _, BufReader},
    process::{Child, ChildStderr, Command, Stdio},
    sync::{Arc, OnceLock, mpsc},
    thread,
    time::Duration,
};
use stillpoint_provider::{Error, ErrorKind, Result};

/// What it may take to end.
const END: Duration = Duration::from_secs(5);

/// Ends the server when the end of a pipe that we hold is closed, so when we die, too.
const SERVE: &str = "rclone serve restic --addr 127.0.0.1:0 -- \"$1\" < /dev/null & server=$!; exec 2> /dev/null; cat > /dev/null; kill $server; wait";

/// `remote` is what follows `rclone:`, a place as `rclone` writes it. Its credentials are where `rclone` has them.
pub(super) fn open(remote: &str) -> Result<RestStore> {
    let location = format!("rclone:{}", shown(remote));
    if has_secrets(remote) {
        let what =
            format!("repository {location:?} has credentials in it, which every user of this host could see");
        return Err(Error::new(ErrorKind::InvalidInput, what)
            .next("make a remote of it with `rclone config`, and name that: rclone:REMOTE:PATH"));
    }
    let cannot = format!("cannot open repository {location}");
    let opening = Opening::new();
    let (server, base) = Rclone::start(remote, &opening).map_err(|fault| fault.while_doing(cannot))?;
    let user = Some((server.user.clone(), server.password.clone()));
    RestStore::over(base, user, location, Some(server), opening)
}

/// Name and value of each parameter of a remote that is written out: `:sftp,host=HOST,pass=SECRET:PATH`.
fn parameters(remote: &str) -> impl Iterator<Item = (&str, &str)> {
    remote.split(',').skip(1).filter_map(|parameter| parameter.split_once('='))
}

fn has_secrets(remote: &str) -> bool {
    parameters(remote).any(|(name, _)| {
        let secret = ["pass", "secret", "token", "key", "credential", "sas", "auth"];
        !name.ends_with("file") && secret.iter().any(|word| name.to_lowercase().contains(word))
    })
}

/// A remote without the values of its parameters.
pub(super) fn shown(remote: &str) -> String {
    match remote.split_once(',') {
        Some((kind, rest)) if parameters(remote).next().is_some() => {
            format!("{kind},...:{}", rest.rsplit_once(':').map_or("", |(_, path)| path))
        }
        _ => remote.to_owned(),
    }
}

/// An `rclone` that serves one remote to us, and to nobody who does not know this password.
pub(super) struct Rclone {
    /// The shell around it.
    child: Option<Child>,
    user: String,
    password: String,
    /// Its last words, when it has ended.
    pub ended: Arc<OnceLock<String>>,
}

impl Rclone {
    /// Starts it, and waits until it serves.
    fn start(remote: &str, opening: &Opening) -> std::result::Result<(Self, Url), Fault> {
        let failed =
            |error: io::Error| Fault::new(ErrorKind::Io, format!("rclone cannot be started: {error}"));
        if !is_installed() {
            return Err(Fault::new(
                ErrorKind::Unsupported,
                "rclone is not installed on this host, or not in PATH",
            )
            .next("install rclone"));
        }
        let mut password = [0; 16];
        crate::crypto::random(&mut password).map_err(|error| failed(io::Error::other(error)))?;
        let password: String = password.iter().map(|byte| format!("{byte:02x}")).collect();
        let user = "stillpoint".to_owned();
        let mut child = Command::new("sh")
            .args(["-c", SERVE, "sh", remote])
            .envs([("RCLONE_USER", &user), ("RCLONE_PASS", &password)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let says = child.stderr.take();
        let server = Self { child: Some(child), user, password, ended: Arc::default() };
        let (tell, told) = mpsc::channel();
        let ended = Arc::clone(&server.ended);
        thread::spawn(move || {
            let last = says.map(|says| listen(says, &tell)).unwrap_or_default();
            let _ = ended.set(last);
        });
        let by_hand = format!("as the user that makes the backups, type: rclone lsd '{}'", shown(remote));
        match told.recv_timeout(opening.left().unwrap_or(FIRST_ANSWER)) {
            Ok(url) => Ok((server, url)),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let last = server.ended.wait();
                let what = format!("rclone ended: {last}");
                Err(if last.contains("didn't find section") || last.contains("didn't find backend") {
                    Fault::new(ErrorKind::InvalidInput, what)
                        .next("as the user that makes the backups, type: rclone listremotes, and correct `repository`")
                } else {
                    Fault::new(ErrorKind::Io, what).next(by_hand)
                })
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let seconds = FIRST_ANSWER.as_secs();
                let what =
                    format!("rclone does not serve within {seconds} s; what it is to reach may not answer");
                Err(Fault::new(ErrorKind::Unreachable, what).next(by_hand))
            }
        }
    }
}

fn is_installed() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join("rclone").is_file())
}

/// Hears what `rclone` says until it has ended, and returns its last words.
fn listen(says: ChildStderr, tell: &mpsc::Sender<Url>) -> String {
    let (mut says, mut line, mut last) = (BufReader::new(says), Vec::new(), String::new());
    while matches!(says.read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        tracing::debug!(text, "rclone");
        if let Some(url) = address(&text) {
            let _ = tell.send(url);
        } else {
            last = without_time(&text).to_owned();
        }
    }
    last
}

/// A line of a log without the time and the level that it begins with: `2026/01/01 12:00:00 Failed to ...`.
fn without_time(line: &str) -> &str {
    let is_time =
        |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_digit() || "/:.".contains(c));
    let mut rest = line;
    while let Some((_, after)) = rest.split_once(' ').filter(|(word, _)| is_time(word)) {
        rest = after.trim_start();
    }
    rest
}

/// The address that a line of `rclone`'s tells.
fn address(line: &str) -> Option<Url> {
    let (_, url) = line.split_once("Serving restic REST API on ")?;
    Url::parse(url.trim().trim_start_matches('[').trim_end_matches(']')).ok()
}

impl Drop for Rclone {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(child.stdin.take());
        let (tell, told) = mpsc::channel();
        thread::spawn(move || tell.send(child.wait()));
        // One that hangs is not worth hanging for.
        let _ = told.recv_timeout(END);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_address_is_found_however_rclone_writes_it() {
        for line in [
            "2026/01/01 NOTICE: Serving restic REST API on http://127.0.0.1:1234/",
            "2026/01/01 NOTICE: : Serving restic REST API on [http://127.0.0.1:1234/]",
        ] {
            assert_eq!(address(line).unwrap().as_str(), "http://127.0.0.1:1234/");
        }
        assert!(address("2026/01/01 ERROR: no such remote").is_none());
        assert_eq!(without_time("2026/01/01 12:00:00 Failed to create"), "Failed to create");
    }

    #[test]
    fn a_remote_with_a_secret_in_it_is_refused_and_not_shown() {
        for bad in [
            ":sftp,host=there,pass=canary:/path",
            ":s3,provider=Minio,secret_access_key=canary:bucket",
            "remote,token='{\"a\":\"canary\"}':path",
        ] {
            let error = open(bad).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(!error.to_string().contains("canary"), "{error}");
            assert!(!super::super::shown(&format!("rclone:{bad}")).contains("canary"));
        }
        assert!(!has_secrets(":sftp,host=there,key_file=/etc/key:/path") && !has_secrets("remote:a,b=c"));
        assert_eq!(shown("remote:path"), "remote:path");
        assert_eq!(shown(":sftp,host=there:/path"), ":sftp,...:/path");
    }
}
