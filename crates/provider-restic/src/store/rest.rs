//! A repository behind restic's REST protocol (restic's documentation, "REST Backend"): a `rest-server`, or `rclone`, which
//! is started for it.

use super::{Folder, LONGEST_PAUSE, Store, TIMEOUT, TRIES, is_file_name, not_found};
use bytes::{Bytes, BytesMut};
use reqwest::{Client, Method, StatusCode, Url, header, redirect};
use serde::Deserialize;
use std::{
    error::Error as _,
    io::{self, BufRead as _, BufReader},
    process::{Child, ChildStderr, Command, Stdio},
    sync::{Arc, OnceLock, mpsc},
    thread,
    time::Duration,
};
use stillpoint_buffer as buffer;
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::runtime::Handle;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// What `rclone` may take until it serves: some remotes are asked first.
const START: Duration = Duration::from_secs(60);
/// What it may take to end.
const END: Duration = Duration::from_secs(5);
/// Most bytes of an answer, whatever a server sends: more than any index, listing or pack has.
const LARGEST: u64 = 1 << 30;
/// The second version of the protocol, whose listings have sizes.
const VERSION: &str = "application/vnd.x.restic.rest.v2";

/// Files of a server. A file appears there whole or not at all, and is as durable as the server makes it.
pub(super) struct RestStore {
    client: Client,
    runtime: Handle,
    /// Ends with a slash.
    base: Url,
    user: Option<(String, String)>,
    location: String,
    server: Option<Rclone>,
}

/// What a server answered.
struct Answer {
    status: StatusCode,
    length: Option<u64>,
    version: String,
    content: Bytes,
}

/// Why there is no answer.
struct Unanswered {
    why: String,
    /// Whether there may be one a moment later.
    of_the_moment: bool,
}

impl From<reqwest::Error> for Unanswered {
    fn from(error: reqwest::Error) -> Self {
        Self { why: told(error), of_the_moment: true }
    }
}

/// What is asked for besides the path.
#[derive(Default)]
struct Asked {
    query: Option<&'static str>,
    range: Option<(u64, u64)>,
    content: Option<Bytes>,
}

impl RestStore {
    /// `rest` is what follows `rest:`, a URL. Who asks is in the environment, as for restic: `RESTIC_REST_USERNAME` and
    /// `RESTIC_REST_PASSWORD`.
    pub(super) fn rest(rest: &str) -> Result<Self> {
        let wrong = |why: &str| {
            let shown = super::shown(&format!("rest:{rest}"));
            let what = format!("repository {shown:?} {why}; it is rest:https://HOST[:PORT]/[PATH]");
            Error::new(ErrorKind::TargetMissing, what)
        };
        let mut base = Url::parse(rest).map_err(|_| wrong("is no URL"))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(wrong("is reached neither by https nor by http"));
        }
        if base.password().is_some() || !base.username().is_empty() {
            return Err(wrong(
                "has credentials in it, which belong into RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD",
            ));
        }
        if base.query().is_some() || base.fragment().is_some() {
            return Err(wrong("has a query in it"));
        }
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        let user = std::env::var("RESTIC_REST_USERNAME").ok().map(|user| {
            let password = std::env::var("RESTIC_REST_PASSWORD").unwrap_or_default();
            (user, password)
        });
        Self::over(base, user, format!("rest:{rest}"), None)
    }

    /// `remote` is what follows `rclone:`, a place as `rclone` writes it. Its credentials are where `rclone` has them.
    pub(super) fn rclone(remote: &str) -> Result<Self> {
        let location = format!("rclone:{remote}");
        let failed = |error: io::Error| {
            Error::new(ErrorKind::TargetMissing, format!("cannot reach repository {location}")).because(error)
        };
        let (server, base) = Rclone::start(remote).map_err(failed)?;
        let user = Some((server.user.clone(), server.password.clone()));
        Self::over(base, user, location, Some(server))
    }

    fn over(
        base: Url,
        user: Option<(String, String)>,
        location: String,
        server: Option<Rclone>,
    ) -> Result<Self> {
        let failed = |what: &str| Error::new(ErrorKind::Io, format!("HTTP cannot be used: {what}"));
        let runtime = Handle::try_current().map_err(|_| failed("there is no runtime"))?;
        // A redirected POST becomes a GET, which stores nothing and may well be answered with 200.
        let mut client = Client::builder().timeout(TIMEOUT).redirect(redirect::Policy::none());
        if server.is_some() {
            // It is on this host, whatever the environment says of proxies.
            client = client.no_proxy();
        }
        let client = client.build().map_err(|error| failed(&told(error)))?;
        Ok(Self { client, runtime, base, user, location, server })
    }

    /// Asks until there is an answer that is not about the moment.
    fn ask(&self, method: &Method, path: &str, asked: &Asked) -> io::Result<Answer> {
        let ask = async {
            let mut pause = FIRST_PAUSE;
            for left in (0..=TRIES).rev() {
                // Its port may be somebody else's by now.
                if let Some(last) = self.server.as_ref().and_then(|server| server.ended.get()) {
                    return Err(io::Error::other(format!("{path}: rclone ended: {last}")));
                }
                match self.ask_once(method, path, asked).await {
                    Ok(answer) if left == 0 || !is_of_the_moment(answer.status) => return Ok(answer),
                    Ok(answer) => tracing::debug!(path, status = %answer.status, "trying again"),
                    Err(error) if left == 0 || !error.of_the_moment => {
                        return Err(io::Error::other(format!("{path}: {}", error.why)));
                    }
                    Err(error) => tracing::debug!(path, why = error.why, "trying again"),
                }
                tokio::time::sleep(pause).await;
                pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
            }
            Err(io::Error::other(format!("{path}: no try is left")))
        };
        self.runtime.block_on(ask)
    }

    async fn ask_once(
        &self,
        method: &Method,
        path: &str,
        asked: &Asked,
    ) -> std::result::Result<Answer, Unanswered> {
        let lasting = |why: String| Unanswered { why, of_the_moment: false };
        let mut url = self.base.join(path).map_err(|error| lasting(error.to_string()))?;
        url.set_query(asked.query);
        let mut request = self.client.request(method.clone(), url).header(header::ACCEPT, VERSION);
        if let Some((user, password)) = &self.user {
            request = request.basic_auth(user, Some(password));
        }
        if let Some((first, last)) = asked.range {
            request = request.header(header::RANGE, format!("bytes={first}-{last}"));
        }
        if let Some(content) = &asked.content {
            request = request.header(header::CONTENT_TYPE, "application/octet-stream").body(content.clone());
        }
        let mut response = request.send().await?;
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let (status, length) = (response.status(), text(header::CONTENT_LENGTH));
        let (length, version) =
            (length.and_then(|text| text.parse().ok()), text(header::CONTENT_TYPE).unwrap_or("").to_owned());
        let most = match (asked.range, status) {
            (Some((first, last)), StatusCode::PARTIAL_CONTENT) => {
                last.saturating_sub(first).saturating_add(1)
            }
            _ => LARGEST,
        };
        let mut content = BytesMut::new();
        while let Some(piece) = response.chunk().await? {
            content.extend_from_slice(&piece);
            if content.len() as u64 > most {
                return Err(lasting(format!("the server sends more than {most} bytes")));
            }
        }
        Ok(Answer { status, length, version, content: content.freeze() })
    }

    /// The length of a file; `None` if it is not there.
    fn length(&self, path: &str) -> io::Result<Option<u64>> {
        let answer = self.ask(&Method::HEAD, path, &Asked::default())?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => match answer.length {
                Some(length) => Ok(Some(length)),
                None => Err(io::Error::other(format!("{path}: the server does not tell how long it is"))),
            },
            status => Err(refused(path, status)),
        }
    }

    fn get(&self, path: &str, range: Option<(u64, u64)>) -> io::Result<Bytes> {
        let answer = self.ask(&Method::GET, path, &Asked { range, ..Asked::default() })?;
        match (answer.status, range) {
            (StatusCode::NOT_FOUND, _) => Err(not_found(path)),
            (StatusCode::OK, None) | (StatusCode::PARTIAL_CONTENT, Some(_)) => Ok(answer.content),
            // The whole file, since it knows no ranges.
            (StatusCode::OK, Some((first, last))) => {
                let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(answer.content.len());
                Ok(answer.content.slice(place(first)..place(last.saturating_add(1))))
            }
            (status, _) => Err(refused(path, status)),
        }
    }
}

/// Whether the same request may be answered otherwise a moment later.
fn is_of_the_moment(status: StatusCode) -> bool {
    status.is_server_error()
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
}

fn refused(path: &str, status: StatusCode) -> io::Error {
    let kind = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    let hint = if status == StatusCode::UNAUTHORIZED {
        "; it wants a user: set RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD"
    } else {
        ""
    };
    io::Error::new(kind, format!("{path}: the server answers {status}{hint}"))
}

/// An error in one line, down to its cause, without the URL.
fn told(error: reqwest::Error) -> String {
    let error = error.without_url();
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

/// Where a file is: there is one folder a kind.
fn path(folder: Folder, name: &str) -> String {
    match folder {
        Folder::Config => "config".to_owned(),
        _ => format!("{}/{name}", folder.name()),
    }
}

impl Store for RestStore {
    fn location(&self) -> String {
        self.location.clone()
    }

    fn create(&self) -> io::Result<()> {
        let asked = Asked { query: Some("create=true"), ..Asked::default() };
        let answer = self.ask(&Method::POST, "", &asked)?;
        if answer.status.is_success() { Ok(()) } else { Err(refused("creating it", answer.status)) }
    }

    fn list(&self, folder: Folder) -> io::Result<Vec<(String, u64)>> {
        #[derive(Deserialize)]
        struct Entry {
            name: String,
            size: u64,
        }
        if folder == Folder::Config {
            let length = self.length("config")?;
            return Ok(length.map(|length| ("config".to_owned(), length)).into_iter().collect());
        }
        let path = format!("{}/", folder.name());
        let answer = self.ask(&Method::GET, &path, &Asked::default())?;
        match answer.status {
            StatusCode::NOT_FOUND => return Ok(Vec::new()),
            status if status.is_success() => {}
            status => return Err(refused(&path, status)),
        }
        let nothing = matches!(answer.content.trim_ascii(), b"" | b"null" | b"[]");
        if nothing {
            return Ok(Vec::new());
        }
        if answer.version != VERSION {
            return Err(io::Error::other(format!(
                "{path}: the server does not speak version 2 of the protocol"
            )));
        }
        let entries: Vec<Entry> = serde_json::from_slice(&answer.content)
            .map_err(|error| io::Error::other(format!("{path}: the server's listing is none: {error}")))?;
        let files = entries.into_iter().filter(|entry| is_file_name(&entry.name));
        Ok(files.map(|entry| (entry.name, entry.size)).collect())
    }

    fn read_into(&self, folder: Folder, name: &str, content: &mut Vec<u8>) -> io::Result<()> {
        content.clear();
        content.extend_from_slice(&self.get(&path(folder, name), None)?);
        Ok(())
    }

    fn read_part(&self, folder: Folder, name: &str, offset: u64, length: u64) -> io::Result<BytesMut> {
        let path = path(folder, name);
        let last = offset.saturating_add(length).saturating_sub(1);
        let got = self.get(&path, Some((offset, last)))?;
        if got.len() as u64 != length {
            let short = format!("{path} is shorter than it was");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, short));
        }
        let mut content = buffer::initialized(got.len());
        content.copy_from_slice(&got);
        Ok(content)
    }

    fn write(&self, folder: Folder, name: &str, content: &[Bytes]) -> io::Result<()> {
        let path = path(folder, name);
        let content = match content {
            [whole] => whole.clone(),
            parts => parts.concat().into(),
        };
        let length = content.len() as u64;
        let answer = self.ask(&Method::POST, &path, &Asked { content: Some(content), ..Asked::default() })?;
        match answer.status {
            status if status.is_success() => Ok(()),
            // It has it already: an earlier try was not answered, or a run before this one wrote it.
            StatusCode::FORBIDDEN | StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED
                if folder != Folder::Config && self.length(&path)? == Some(length) =>
            {
                Ok(())
            }
            status => Err(refused(&path, status)),
        }
    }

    fn remove(&self, folder: Folder, name: &str) -> io::Result<()> {
        let path = path(folder, name);
        let answer = self.ask(&Method::DELETE, &path, &Asked::default())?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(()),
            status if status.is_success() => Ok(()),
            status => Err(refused(&path, status)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends the server when the end of a pipe that we hold is closed, so when we die, too.
const SERVE: &str = "rclone serve restic --addr 127.0.0.1:0 -- \"$1\" < /dev/null & server=$!; exec 2> /dev/null; cat > /dev/null; kill $server; wait";

/// An `rclone` that serves one remote to us, and to nobody who does not know this password.
struct Rclone {
    /// The shell around it.
    child: Option<Child>,
    user: String,
    password: String,
    /// Its last words, when it has ended.
    ended: Arc<OnceLock<String>>,
}

impl Rclone {
    /// Starts it, and waits until it serves.
    fn start(remote: &str) -> io::Result<(Self, Url)> {
        let mut password = [0; 16];
        crate::crypto::random(&mut password).map_err(io::Error::other)?;
        let password: String = password.iter().map(|byte| format!("{byte:02x}")).collect();
        let user = "stillpoint".to_owned();
        let mut child = Command::new("sh")
            .args(["-c", SERVE, "sh", remote])
            .envs([("RCLONE_USER", &user), ("RCLONE_PASS", &password)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let says = child.stderr.take();
        let server = Self { child: Some(child), user, password, ended: Arc::default() };
        let (tell, told) = mpsc::channel();
        let ended = Arc::clone(&server.ended);
        thread::spawn(move || {
            let last = says.map(|says| listen(says, &tell)).unwrap_or_default();
            let _ = ended.set(last);
        });
        let failed = |why: String| Err(io::Error::other(why));
        match told.recv_timeout(START) {
            Ok(url) => Ok((server, url)),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                failed(format!("rclone ended: {}", server.last_words()))
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                failed(format!("rclone does not serve after {} s", START.as_secs()))
            }
        }
    }

    fn last_words(&self) -> &str {
        self.ended.wait()
    }
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
            last = text;
        }
    }
    last
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
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    const NAME: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    /// A server that answers each connection as told, whatever is asked, and tells what that was.
    fn scripted(answers: &[&str]) -> (String, mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/vms", listener.local_addr().unwrap());
        let answers: Vec<_> = answers.iter().map(|&answer| answer.to_owned()).collect();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = vec![0; 64 << 10];
                let length = stream.read(&mut request).unwrap();
                let _ = tell.send(String::from_utf8_lossy(&request[..length]).into_owned());
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        (url, told)
    }

    fn answer(status: &str, kind: &str, content: &str) -> String {
        let length = content.len();
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{content}"
        )
    }

    async fn with<T: Send + 'static>(url: &str, work: impl FnOnce(&RestStore) -> T + Send + 'static) -> T {
        let store = RestStore::rest(url).unwrap();
        tokio::task::spawn_blocking(move || work(&store)).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_of_the_moment_is_tried_again() {
        let cut = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc";
        let (url, told) =
            scripted(&[&answer("500 Oops", "text/plain", ""), cut, &answer("200 OK", "x", "abc")]);
        let read = with(&url, |store| store.read(Folder::Index, NAME)).await.unwrap();
        assert_eq!(&read[..], b"abc");
        for _ in 0..3 {
            assert!(told.recv().unwrap().starts_with(&format!("GET /vms/index/{NAME} HTTP/1.1")));
        }
    }

    #[tokio::test]
    async fn a_server_that_lies_is_not_believed() {
        let much = answer("206 Partial", "x", "abcd");
        let elsewhere =
            "HTTP/1.1 301 Moved\r\nLocation: /vms/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        let endless = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n";
        let (url, told) = scripted(&[&much, elsewhere, endless]);
        with(&url, |store| {
            let more = store.read_part(Folder::Data, NAME, 0, 2).unwrap_err();
            assert!(more.to_string().contains("more than 2 bytes"), "{more}");
            // A POST that is sent elsewhere is a GET there, and nothing is written.
            let moved = store.write(Folder::Data, NAME, &[Bytes::from_static(b"a")]).unwrap_err();
            assert!(moved.to_string().contains("301"), "{moved}");
            // Of unknown length is not the same as not there.
            assert!(store.list(Folder::Config).is_err());
        })
        .await;
        assert_eq!(told.iter().count(), 3, "each was asked once");
    }

    #[tokio::test]
    async fn a_listing_has_sizes_and_only_names_of_files() {
        let listing = format!("[{{\"name\":\"{NAME}\",\"size\":7}},{{\"name\":\"../etc\",\"size\":1}}]");
        let (url, told) = scripted(&[&answer("200 OK", VERSION, &listing)]);
        let found = with(&url, |store| store.list(Folder::Data)).await.unwrap();
        assert_eq!(found, [(NAME.to_owned(), 7)]);
        assert!(told.recv().unwrap().to_lowercase().contains(&format!("accept: {VERSION}")));
        for (kind, content) in [(VERSION, "no JSON"), ("application/vnd.x.restic.rest.v1", "[\"x\"]")] {
            let (url, _told) = scripted(&[&answer("200 OK", kind, content)]);
            assert!(with(&url, |store| store.list(Folder::Data)).await.is_err(), "{content}");
        }
    }

    #[tokio::test]
    async fn what_is_there_already_is_written_and_what_is_refused_is_an_error() {
        let there = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n";
        let no = answer("403 Forbidden", "text/plain", "");
        let (url, _told) = scripted(&[&no, there, &no, there]);
        with(&url, |store| {
            store.write(Folder::Data, NAME, &[Bytes::from_static(b"a"), Bytes::from_static(b"bc")]).unwrap();
            let other = store.write(Folder::Data, NAME, &[Bytes::from_static(b"longer")]).unwrap_err();
            assert_eq!(other.kind(), io::ErrorKind::PermissionDenied);
        })
        .await;
    }

    #[tokio::test]
    async fn a_part_that_is_too_short_is_an_error_and_a_whole_file_is_cut() {
        let part = answer("206 Partial", "x", "bc");
        let (url, told) = scripted(&[&part, &part, &answer("200 OK", "x", "abcd")]);
        with(&url, |store| {
            assert_eq!(&store.read_part(Folder::Data, NAME, 1, 2).unwrap()[..], b"bc");
            let short = store.read_part(Folder::Data, NAME, 1, 3).unwrap_err();
            assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
            assert_eq!(&store.read_part(Folder::Data, NAME, 1, 2).unwrap()[..], b"bc");
        })
        .await;
        assert!(told.recv().unwrap().to_lowercase().contains("range: bytes=1-2\r\n"));
    }

    #[test]
    fn a_url_that_cannot_be_one_is_refused_without_showing_a_password() {
        for bad in ["", "host", "ftp://host/", "https://me:canary@host/", "https://host/?canary=1"] {
            let error = RestStore::rest(bad).err().unwrap().to_string();
            assert!(error.contains("rest:https://HOST"), "{error}");
            assert!(!error.contains("me:canary"), "{error}");
        }
    }

    #[test]
    fn the_address_is_found_however_rclone_writes_it() {
        for line in [
            "2026/01/01 NOTICE: Serving restic REST API on http://127.0.0.1:1234/",
            "2026/01/01 NOTICE: : Serving restic REST API on [http://127.0.0.1:1234/]",
        ] {
            assert_eq!(address(line).unwrap().as_str(), "http://127.0.0.1:1234/");
        }
        assert!(address("2026/01/01 ERROR: no such remote").is_none());
    }
}
