//! A real `sshd`, on a port of its own.

use super::*;
use std::{
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    process::{Child, Command, Stdio},
    thread,
};
use stillpoint_testkit::{BareMachine, Qemu, skip};

struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

pub fn make_key(path: &Path) {
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", ""]).arg("-f").arg(path));
}

impl Server {
    /// Lets in whoever has the key `user` in `work`.
    fn start(work: &Path, more: &str) -> Option<Self> {
        // Where it leaves its rights behind; made by its service as a rule.
        let _ = fs::create_dir_all("/run/sshd");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let path = |name: &str| work.join(name).display().to_string();
        let config = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nPidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nAuthorizedKeysFile {}\n{more}\n",
            path("host"),
            path("user.pub"),
        );
        fs::write(work.join("sshd_config"), config).unwrap();
        let log = fs::File::create(work.join("sshd.log")).unwrap();
        let child = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(work.join("sshd_config"))
            .stderr(log)
            .spawn();
        let mut child = child.unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if child.try_wait().unwrap().is_some() {
                skip(
                    "sftp",
                    &format!("no sshd here: {}", fs::read_to_string(work.join("sshd.log")).unwrap().trim()),
                );
                return None;
            }
            assert!(Instant::now() < deadline, "no sshd");
            thread::sleep(Duration::from_millis(20));
        }
        Some(Self { child, port })
    }
}

/// The real `ssh`, with a configuration of the test's own instead of that of the user who runs it.
fn own_ssh(work: &Path) -> String {
    let programs = work.join("programs");
    fs::create_dir_all(&programs).unwrap();
    let config = work.join("ssh_config");
    let path = |name: &str| work.join(name).display().to_string();
    fs::write(
        &config,
        format!(
            "IdentityFile {}\nIdentitiesOnly yes\nIdentityAgent none\nUserKnownHostsFile {}\nGlobalKnownHostsFile none\n",
            path("user"),
            path("known_hosts")
        ),
    )
    .unwrap();
    let script = programs.join("ssh");
    fs::write(&script, format!("#!/bin/sh\nexec /usr/bin/ssh -F {} \"$@\"\n", config.display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", programs.display(), std::env::var("PATH").unwrap())
}

fn user() -> String {
    let name = Command::new("id").arg("-un").output().unwrap().stdout;
    String::from_utf8(name).unwrap().trim().to_owned()
}

#[test]
fn points_behind_ssh_come_back_and_what_ssh_refuses_is_told() {
    let mut machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 8 << 20)]).unwrap();
    machine.disk_io("vda", "write -P 1 0 3M").unwrap();
    let target = Target::new("");
    let work = target.path().to_owned();
    for name in ["host", "user", "other"] {
        make_key(&work.join(name));
    }
    let Some(server) = Server::start(&work, "Subsystem sftp internal-sftp") else { return };
    let at = |path: &str| format!("repository = \"sftp://{}@127.0.0.1:{}{path}\"", user(), server.port);
    let target = target.quiet().env("PATH", &own_ssh(&work));
    let repository = work.join("behind/it");
    target.set("repository", &at(repository.to_str().unwrap()));
    let config = fs::read_to_string(&target.place.config).unwrap();
    let config = config.replace(work.join("no.qmp").to_str().unwrap(), machine.qmp().to_str().unwrap());
    fs::write(&target.place.config, &config).unwrap();

    target.says(1, "host key of 127.0.0.1", "log in once by hand and compare the key: ssh -p");
    let known = |key: &str| {
        let key = fs::read_to_string(work.join(key)).unwrap();
        fs::write(work.join("known_hosts"), format!("[127.0.0.1]:{} {key}", server.port)).unwrap();
    };
    known("other.pub");
    target.says(1, "has changed", "ssh-keygen -R '[127.0.0.1]:");
    known("host.pub");
    // A typing error makes no directory on the other side, as opening one there once did.
    target.says(1, "there is no such directory", "stillpoint target init main");
    assert!(!work.join("behind").exists());
    fs::create_dir_all(&repository).unwrap();
    target.says(1, "there is no repository at sftp:", "stillpoint target init main");
    let made = target.place.run(&["target", "init", "main"]);
    assert_eq!(made.status, 0, "{made:?}");
    for pattern in [2, 3] {
        machine.disk_io("vda", &format!("write -P {pattern} 4M 1M")).unwrap();
        target.place.backup();
    }
    machine.disk_io("vda", "flush").unwrap();
    assert_eq!(target.place.run(&["verify"]).status, 0);
    let output = work.join("out");
    let restored = target.place.run(&["restore", "vm/latest", "--output", output.to_str().unwrap()]);
    assert_eq!(restored.status, 0, "{restored:?}");
    assert!(fs::read(output.join("vda.raw")).unwrap()[4 << 20..5 << 20].iter().all(|byte| *byte == 3));
    let mut check = Command::new("restic");
    check.args(["--no-cache", "check", "--read-data"]).env("RESTIC_REPOSITORY", &repository);
    run(check.env("RESTIC_PASSWORD", PASSWORD));

    // The key is not let in any more; the backup leaves the guest alone.
    fs::copy(work.join("other.pub"), work.join("user.pub")).unwrap();
    target.says(1, "refuses the log-in", "this has to log in without a question: ssh -p");
    let backup = target.says_to(&["backup", "vm", "--target", "main"], 1, "refuses the log-in", "ssh -p");
    assert!(backup.stderr.contains("was not touched"), "{}", backup.stderr);
    drop(server);
    target.says(1, "refuses the connection", "check that the server runs");

    // Log-ins, but no files.
    make_key(&work.join("third"));
    fs::rename(work.join("third"), work.join("user")).unwrap();
    fs::rename(work.join("third.pub"), work.join("user.pub")).unwrap();
    let Some(shell) = Server::start(&work, "") else { return };
    let key = fs::read_to_string(work.join("host.pub")).unwrap();
    fs::write(work.join("known_hosts"), format!("[127.0.0.1]:{} {key}", shell.port)).unwrap();
    target.set("repository", &format!("repository = \"sftp://{}@127.0.0.1:{}/x\"", user(), shell.port));
    target.says(1, "offers no SFTP", "sshd_config");
    target.set("repository", "repository = \"sftp:me@no-such-host.invalid:/x\"");
    target.says(1, "no-such-host.invalid leads nowhere", "DNS");
}
