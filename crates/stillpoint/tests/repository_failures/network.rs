//! Object stores, REST servers and `rclone`.

use super::*;
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    thread,
};
use stillpoint_testkit::object_store::{self, ObjectStore};

/// Accepts connections and answers all with this; with nothing at all if it is empty.
fn server(answer: &str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, answer) = (listener.local_addr().unwrap(), answer.to_owned());
    thread::spawn(move || {
        let mut open = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if answer.is_empty() {
                open.push(stream);
            } else {
                let _ = stream.read(&mut [0; 64 << 10]);
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    address
}

fn answer(status: &str, content: &str) -> String {
    let length = content.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{content}")
}

/// A port where nobody listens.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

const NOBODY: &str = "refuses the connection: nothing listens there";
const NO_NAME: &str = "the name of host no-such-host.invalid leads nowhere";
const SILENT: &str = "has not answered within 12 s";

fn s3(url: &str) -> Target {
    let target = Target::new(&format!("s3:{url}")).quiet();
    target
        .env("AWS_ACCESS_KEY_ID", object_store::ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", object_store::SECRET_KEY)
}

#[test]
fn an_object_store_that_says_no_is_told_with_what_to_check() {
    let work = tempfile::tempdir().unwrap();
    let store = ObjectStore::start(work.path()).unwrap();
    let bucket = format!("{}/{}", store.url(), object_store::BUCKET);
    s3(&bucket).says(1, "there is no repository at s3:", "stillpoint target init main");
    let none = s3(&format!("{}/no-such-bucket/path", store.url()));
    none.says(1, "there is no bucket \"no-such-bucket\"", "correct the bucket's name");
    none.says_to(&["target", "init", "main"], 1, "there is no bucket", "stillpoint makes none");
    s3(&bucket).env("AWS_ACCESS_KEY_ID", "other").says(1, "NotSignedUp", "check AWS_ACCESS_KEY_ID");
    s3(&bucket).env("AWS_SECRET_ACCESS_KEY", "other").says(
        1,
        "SignatureDoesNotMatch",
        "check AWS_SECRET_ACCESS_KEY",
    );
    // Nor in a file of this host's user.
    let home = work.path().join("home");
    fs::create_dir(&home).unwrap();
    let anonymous = Target::new(&format!("s3:{bucket}")).quiet().env("HOME", home.to_str().unwrap());
    anonymous.says(1, "there are no credentials for", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
    s3(&format!("http://{}/bucket", nobody())).says(1, NOBODY, "check that the server runs");
    s3("https://no-such-host.invalid/bucket").says(1, NO_NAME, "DNS");
    for (status, code, wrong, next) in [
        ("403 Forbidden", "InvalidAccessKeyId", "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"),
        ("403 Forbidden", "RequestTimeTooSkewed", "RequestTimeTooSkewed", "set the clock of this host"),
        ("400 Bad Request", "ExpiredToken", "ExpiredToken", "get a new session token"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "AuthorizationHeaderMalformed", "set AWS_REGION"),
        ("403 Forbidden", "AccessDenied", "AccessDenied", "give the access key the rights"),
    ] {
        let xml =
            format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>words</Message></Error>");
        // An answer to HEAD has no content, whatever its length says.
        let target = s3(&format!("http://{}/bucket", server(&answer(status, &xml))));
        target.says(if code.starts_with("Auth") { 2 } else { 1 }, wrong, next);
    }
    s3("https://key:canary-x@host/bucket").says(2, "has credentials in it", "write it as s3:");
}

#[test]
fn a_host_that_does_not_answer_is_told_in_time() {
    // All at once: each takes as long as is waited for a first answer.
    let silent = server("");
    let targets = [
        s3(&format!("http://{silent}/bucket")),
        Target::new(&format!("rest:http://{silent}/path")).quiet(),
        Target::new(&format!("rest:https://{silent}/path")).quiet(),
    ];
    let waiting: Vec<_> = targets
        .into_iter()
        .map(|target| {
            thread::spawn(move || drop(target.says(1, SILENT, "that it runs and is reached from here")))
        })
        .collect();
    let ssh = thread::spawn(move || {
        let target = Target::new(&format!("sftp://me@{silent}/path")).quiet();
        target.says(1, "127.0.0.1", "that it runs");
    });
    let rclone = thread::spawn(move || {
        let key = tempfile::tempdir().unwrap();
        let key = key.path().join("key");
        ssh::make_key(&key);
        let remote =
            format!(":sftp,host=127.0.0.1,port={},user=me,key_file={}:/path", silent.port(), key.display());
        let target = Target::new(&format!("rclone:{remote}")).quiet();
        target.says(1, "rclone", "type: rclone lsd");
    });
    // A backup of several VMs, all of them off, waits once.
    let several = thread::spawn(move || {
        let target = Target::new(&format!("rest:http://{silent}/path")).quiet();
        let config = fs::read_to_string(&target.place.config).unwrap();
        let image = target.path().join("image");
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        let vms = ["a", "b", "c"]
            .map(|vm| format!("[vm.{vm}]\ndisks = {{ vda = {{ image = {image:?}, format = \"raw\" }} }}\n"));
        fs::write(&target.place.config, config.replace("[vm.vm]", "[vm.old]") + "\n" + &vms.concat())
            .unwrap();
        let started = Instant::now();
        let outcome = target.place.run(&["backup", "a", "b", "c"]);
        assert_eq!(outcome.status, 1, "{outcome:?}");
        assert_eq!(outcome.stderr.matches(SILENT).count(), 3, "{outcome:?}");
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    });
    for thread in waiting.into_iter().chain([ssh, rclone, several]) {
        thread.join().unwrap();
    }
}

/// An `rclone` that serves a directory as a REST server.
struct Rest {
    child: Child,
    address: String,
}

impl Rest {
    fn start(directory: &Path, more: &[&str]) -> Self {
        let mut child = Command::new("rclone")
            .args(["serve", "restic", "--addr", "127.0.0.1:0"])
            .args(more)
            .arg(directory)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains("://")).unwrap();
        let address = line.split_once("://").unwrap().1.trim_end_matches([']', '/']).to_owned();
        thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn rest(url: &str) -> Target {
    Target::new(&format!("rest:{url}")).quiet()
}

#[test]
fn a_rest_server_that_says_no_is_told_with_what_to_check() {
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    let plain = Rest::start(&work.path().join("files"), &[]);
    let asks = Rest::start(&work.path().join("files"), &["--user", "me", "--pass", "canary-x"]);
    rest(&format!("http://{}/vm", plain.address)).says(
        1,
        "there is no repository at rest:",
        "stillpoint target init main",
    );
    rest(&format!("http://{}/vm", asks.address)).says(1, "401", "set RESTIC_REST_USERNAME");
    let wrong = rest(&format!("http://{}/vm", asks.address)).env("RESTIC_REST_USERNAME", "me");
    wrong.env("RESTIC_REST_PASSWORD", "wrong").says(
        1,
        "401",
        "check RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD",
    );
    rest(&format!("https://{}/vm", plain.address)).says(
        2,
        "does not speak TLS on this port",
        "write http://",
    );
    rest(&format!("http://{}/vm", nobody())).says(1, NOBODY, "check that the server runs");
    rest("https://no-such-host.invalid/vm").says(1, NO_NAME, "DNS");
    rest("https://me:canary-x@host/vm").says(2, "has credentials in it", "write it as rest:");

    for (authority, wrong) in [("TRUE", "is that of an authority"), ("FALSE", "is not trusted here")] {
        let certificate = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-addext", &format!("basicConstraints=critical,CA:{authority}")])
            .args(["-keyout", &path("key"), "-out", &path("certificate")])
            .output()
            .unwrap();
        assert!(certificate.status.success(), "{certificate:?}");
        let tls = ["--cert", &path("certificate"), "--key", &path("key")];
        let secure = Rest::start(&work.path().join("files"), &tls);
        rest(&format!("https://{}/vm", secure.address)).says(1, wrong, "update-ca-certificates");
        rest(&format!("http://{}/vm", secure.address)).says(2, "400", "write https://");
    }

    for (status, wrong, next) in [
        ("403 Forbidden", "403", "check the path in `repository`"),
        ("405 Method Not Allowed", "405", "address of a restic REST server"),
        ("500 Oops", "500", "the server's own log"),
        ("503 Service Unavailable", "503", "the server's own log"),
    ] {
        rest(&format!("http://{}/vm", server(&answer(status, "")))).says(1, wrong, next);
    }
    let moved =
        "HTTP/1.1 301 Moved\r\nLocation: https://x/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    rest(&format!("http://{}/vm", server(moved))).says(2, "301", "write the address that it redirects to");
    // Any web server that has a page for everything.
    let page = server(&answer("200 OK", "<html>welcome</html>"));
    rest(&format!("http://{page}/vm")).says(
        1,
        "does not speak restic's REST protocol",
        "address of a restic REST server",
    );
}

#[test]
fn rclone_that_cannot_is_told_with_what_to_check() {
    let target = Target::new("rclone:no-such-remote:/path").quiet();
    let config = target.path().join("rclone.conf");
    let target = target.env("RCLONE_CONFIG", config.to_str().unwrap());
    target.says(2, "didn't find section in config file", "rclone listremotes");
    fs::write(&config, "[remote]\ntype = no-such-type\n").unwrap();
    target.set("repository", "repository = \"rclone:remote:/path\"");
    target.says(2, "rclone ended", "rclone listremotes");
    let key = target.path().join("key");
    ssh::make_key(&key);
    let (port, key) = (nobody().port(), key.display());
    let sftp =
        format!("[remote]\ntype = sftp\nhost = 127.0.0.1\nport = {port}\nuser = me\nkey_file = {key}\n");
    fs::write(&config, sftp).unwrap();
    target.says(1, "connection refused", "type: rclone lsd 'remote:/path'");
    target.set("repository", "repository = \"rclone::sftp,host=x,pass=canary-x:/path\"");
    target.says(2, "has credentials in it", "rclone config");
    // A directory of programs without it.
    let programs = target.path().join("programs");
    fs::create_dir(&programs).unwrap();
    target.set("repository", "repository = \"rclone:remote:/path\"");
    let target = target.env("PATH", programs.to_str().unwrap());
    target.says(1, "rclone is not installed", "install rclone");
    target.set("repository", "repository = \"sftp:me@host:/path\"");
    target.says(1, "ssh is not installed", "openssh-client");
}
