//! A repository on a host that is reached with OpenSSH.

use super::{
    Opening, network,
    object::{Act, Kind, ObjectStore, Place},
};
use crate::{
    child::{self, Outcome},
    error::Fault,
};
use opendal::{ErrorKind as ObjectError, Operator, services};
use std::{
    io,
    process::{Command, Stdio},
    time::Duration,
};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Most that is read of what `ssh` says.
const MOST: u64 = 64 << 10;

/// `rest` is what follows `sftp:`, either `user@host:/path` or `//user@host[:port]/path`. Keys and known hosts are
/// OpenSSH's, whose client is used.
pub(super) fn open(rest: &str) -> Result<ObjectStore> {
    let wrong = || {
        Error::new(
            ErrorKind::InvalidInput,
            format!("repository {:?} names no host, or no whole path", format!("sftp:{rest}")),
        )
        .next("write it as sftp:[USER@]HOST:/PATH or sftp://[USER@]HOST[:PORT]/PATH")
    };
    let (address, path) = match rest.strip_prefix("//") {
        Some(rest) => rest.split_once('/').map(|(address, path)| (address, format!("/{path}"))),
        None => rest.split_once(':').map(|(address, path)| (address, path.to_owned())),
    }
    .filter(|(address, path)| !address.is_empty() && path.starts_with('/'))
    .ok_or_else(wrong)?;
    let (user, host) = address.rsplit_once('@').map_or((None, address), |(user, host)| (Some(user), host));
    // It would be an option of `ssh`.
    if host.is_empty() || host.starts_with('-') || user.is_some_and(|user| user.starts_with('-')) {
        return Err(wrong());
    }
    let opening = Opening::new();
    let login = Login::new(user, host);
    let cannot = format!("cannot open repository sftp:{rest}");
    login.probe(&opening).map_err(|fault| fault.while_doing(cannot))?;
    // Not the repository's own directory: whatever is the root here is made, and a typing error would make directories.
    let mut service = services::Sftp::default().endpoint(&format!("ssh://{host}")).root("/");
    if let Some(user) = user {
        service = service.user(user);
    }
    let operator = Operator::new(service).map_err(|error| wrong().because(error.to_string()))?;
    let place = Place {
        location: format!("sftp:{rest}"),
        host: host.to_owned(),
        prefix: format!("{}/", path.trim_matches('/')),
        kind: Kind::Sftp { login: login.to_string() },
    };
    ObjectStore::over(operator, place, opening)
}

/// Who logs in where.
struct Login<'a> {
    user: Option<&'a str>,
    host: &'a str,
    port: Option<&'a str>,
    /// Host and port, for messages.
    address: &'a str,
}

/// What a person types to log in.
impl std::fmt::Display for Login<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ssh ")?;
        if let Some(port) = self.port {
            write!(f, "-p {port} ")?;
        }
        if let Some(user) = self.user {
            write!(f, "{user}@")?;
        }
        f.write_str(self.host)
    }
}

impl<'a> Login<'a> {
    fn new(user: Option<&'a str>, address: &'a str) -> Self {
        let port = address.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok());
        let (host, port) = port.map_or((address, None), |(host, port)| (host, Some(port)));
        Self { user, host, port, address }
    }

    /// Logs in once and asks for nothing. The library that does the work tells neither why it cannot, nor ends the `ssh`
    /// that it started when it is given up.
    fn probe(&self, opening: &Opening) -> std::result::Result<(), Fault> {
        let left = opening.left().unwrap_or(super::FIRST_ANSWER);
        let mut command = Command::new("ssh");
        command.args(["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]);
        // A connection that others share would keep the pipe open.
        command.args(["-o", "ControlPath=none", "-o", &format!("ConnectTimeout={}", left.as_secs().max(1))]);
        if let Some(port) = self.port {
            command.args(["-p", port]);
        }
        if let Some(user) = self.user {
            command.args(["-l", user]);
        }
        command.args(["-s", "--", self.host, "sftp"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                Fault::new(ErrorKind::Unsupported, "ssh is not installed on this host, or not in PATH")
                    .next("install OpenSSH's client (openssh-client)")
            }
            _ => Fault::new(ErrorKind::Io, format!("ssh cannot be started: {error}")),
        })?;
        let says = child.stderr.take();
        // What it says at its own deadline is better than what we would say at ours.
        let patience = left.saturating_add(Duration::from_millis(500));
        let outcome = child::outcome(child, says, MOST, patience);
        match outcome.map_err(|error| Fault::new(ErrorKind::Io, format!("ssh cannot be heard: {error}")))? {
            Outcome::Ended(status, _) if status.success() => Ok(()),
            Outcome::Ended(_, says) => Err(self.refused(&String::from_utf8_lossy(&says))),
            Outcome::TooMuch => Err(Fault::new(ErrorKind::Io, "ssh prints without end")),
            Outcome::Late => Err(network::late(self.address, None)),
        }
    }

    /// What it means that `ssh` ended with this on its lips.
    fn refused(&self, says: &str) -> Fault {
        let address = self.address;
        let clean = |line: &str| line.chars().filter(|c| !c.is_control()).take(300).collect::<String>();
        let lines: Vec<_> =
            says.lines().map(|line| clean(line.trim())).filter(|line| !line.is_empty()).collect();
        let last = lines.last().map_or("it says nothing", String::as_str);
        let has = |words: &[&str]| words.iter().any(|word| says.contains(word));
        if has(&["IDENTIFICATION HAS CHANGED"]) {
            return Fault::new(ErrorKind::TargetForeign, format!("the host key of {address} has changed"))
                .next(format!(
                    "find out why; if the host was installed anew, type: ssh-keygen -R '{}', then: {self}",
                    self.known_as()
                ));
        }
        if has(&["Host key verification failed", "host key is known"]) {
            return Fault::new(
                ErrorKind::TargetForeign,
                format!("the host key of {address} is not known here"),
            )
            .next(format!(
                "as the user that makes the backups, log in once by hand and compare the key: {self}"
            ));
        }
        if has(&["Permission denied ("]) {
            return Fault::new(ErrorKind::Unauthorized, format!("{address} refuses the log-in: {last}"))
                .next(format!(
                    "as the user that makes the backups, this has to log in without a question: {self}"
                ));
        }
        if has(&["Could not resolve"]) {
            return network::unknown_name(address);
        }
        if has(&["Connection refused"]) {
            return network::refused(address);
        }
        if has(&["timed out", "No route to host", "unreachable", "Connection reset", "Connection closed"]) {
            return Fault::new(ErrorKind::Unreachable, format!("{address} does not answer: {last}")).next(
                format!("check that {address} is the right host and port, and that it runs; try: {self}"),
            );
        }
        if has(&["subsystem request failed", "sftp-server"]) {
            return Fault::new(ErrorKind::Unsupported, format!("{address} offers no SFTP: {last}"))
                .next("turn SFTP on there (\"Subsystem sftp\" in sshd_config)");
        }
        Fault::new(ErrorKind::Io, format!("ssh to {address} failed: {last}")).next(format!("try: {self}"))
    }

    /// Its name in a file of known hosts.
    fn known_as(&self) -> String {
        self.port.map_or(self.host.to_owned(), |port| format!("[{}]:{port}", self.host))
    }
}

/// What an error of the host means.
pub(super) fn fault(host: &str, login: &str, error: &opendal::Error, act: Act) -> Fault {
    let why: String = network::chain(error).chars().filter(|c| !c.is_control()).take(300).collect();
    // It begins with fields of the request; the causes tell.
    let why = std::error::Error::source(error)
        .map_or(why, |cause| network::chain(cause).chars().take(300).collect());
    match (error.kind(), act) {
        (ObjectError::PermissionDenied, Act::Read) => {
            Fault::new(ErrorKind::Unauthorized, format!("{host} does not let this user read it"))
                .next(format!("give the user that logs in there ({login}) the right to read and write it"))
        }
        (ObjectError::PermissionDenied, Act::Write) => {
            Fault::new(ErrorKind::TargetReadOnly, format!("{host} does not let this user write it"))
                .next(format!("give the user that logs in there ({login}) the right to write it"))
        }
        _ => {
            let fault = Fault::new(ErrorKind::Io, format!("{host}: {why}"));
            match act {
                // A server has one word for all that goes wrong, above all for a full disk.
                Act::Write => {
                    fault.next(format!("see whether there is room and a right to write: {login} df -h"))
                }
                Act::Read => fault.next(format!("see whether it can be reached: {login}")),
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_location_that_cannot_be_one_is_refused() {
        for bad in [
            "",
            "host",
            "user@host",
            "host:relative",
            "-oProxyCommand=x:/path",
            "//-oProxyCommand=x/path",
            "@:/x",
        ] {
            assert_eq!(open(bad).err().unwrap().kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }

    #[test]
    fn what_ssh_says_has_its_kind() {
        let login = Login::new(Some("me"), "host:2222");
        assert_eq!(login.to_string(), "ssh -p 2222 me@host");
        for (says, kind) in [
            (
                "@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.\r\n",
                ErrorKind::TargetForeign,
            ),
            (
                "No ED25519 host key is known for [host]:2222\r\nHost key verification failed.\r\n",
                ErrorKind::TargetForeign,
            ),
            ("me@host: Permission denied (publickey).\r\n", ErrorKind::Unauthorized),
            ("ssh: Could not resolve hostname host: Name or service not known\r\n", ErrorKind::Unreachable),
            ("ssh: connect to host host port 2222: Connection refused\r\n", ErrorKind::Unreachable),
            ("ssh: connect to host host port 2222: Connection timed out\r\n", ErrorKind::Unreachable),
            ("subsystem request failed on channel 0\r\n", ErrorKind::Unsupported),
            ("/root/.ssh/config: line 1: Bad configuration option: x\r\n", ErrorKind::Io),
            ("", ErrorKind::Io),
        ] {
            let error = login.refused(says).while_doing("open");
            assert_eq!(error.kind(), kind, "{says}");
            assert!(error.what_next().is_some());
        }
    }
}
