//! A repository behind restic's REST protocol (restic's documentation, "REST Backend"): a `rest-server`, or `rclone`, which
//! is started for it.

use super::{
    FIRST_TRIES, Folder, LONGEST_PAUSE, Opening, Store, TIMEOUT, TRIES, is_file_name,
    network::{self, chain},
    not_found,
    rclone::Rclone,
};
use crate::error::Fault;
use bytes::{Bytes, BytesMut};
use reqwest::{Client, Method, StatusCode, Url, header, redirect};
use serde::Deserialize;
use std::{io, time::Duration};
use stillpoint_buffer as buffer;
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::runtime::Handle;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
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
    /// Host and port, for messages.
    host: String,
    opening: Opening,
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
    why: Fault,
    /// Whether there may be one a moment later.
    of_the_moment: bool,
}

/// What is asked for besides the path.
#[derive(Default)]
struct Asked {
    query: Option<&'static str>,
    range: Option<(u64, u64)>,
    content: Option<Bytes>,
    /// Most bytes of a whole file; less than [`LARGEST`] if there is some.
    most: Option<u64>,
}

impl RestStore {
    /// `rest` is what follows `rest:`, a URL. Who asks is in the environment, as for restic: `RESTIC_REST_USERNAME` and
    /// `RESTIC_REST_PASSWORD`.
    pub(super) fn rest(rest: &str) -> Result<Self> {
        let wrong = |why: &str| {
            let shown = super::shown(&format!("rest:{rest}"));
            Error::new(ErrorKind::InvalidInput, format!("repository {shown:?} {why}"))
                .next("write it as rest:https://HOST[:PORT]/[PATH]")
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
        let here = matches!(base.host_str(), Some("127.0.0.1" | "[::1]" | "localhost"));
        if user.is_some() && base.scheme() == "http" && !here {
            let host = base.host_str();
            tracing::warn!(
                host,
                "the password of RESTIC_REST_PASSWORD crosses the network in the clear; use https"
            );
        }
        Self::over(base, user, format!("rest:{rest}"), None, Opening::new())
    }

    pub(super) fn over(
        base: Url,
        user: Option<(String, String)>,
        location: String,
        server: Option<Rclone>,
        opening: Opening,
    ) -> Result<Self> {
        let failed = |what: &str| Error::new(ErrorKind::Io, format!("HTTP cannot be used: {what}"));
        let runtime = Handle::try_current().map_err(|_| failed("there is no runtime"))?;
        // A redirected POST becomes a GET, which stores nothing and may well be answered with 200.
        let mut client = Client::builder().timeout(TIMEOUT).redirect(redirect::Policy::none());
        if server.is_some() {
            // It is on this host, whatever the environment says of proxies.
            client = client.no_proxy();
        }
        let client = client.build().map_err(|error| failed(&chain(&error)))?;
        let name = base.host_str().unwrap_or_default();
        let host = match (&server, base.port()) {
            (Some(_), _) => "what rclone is to reach".to_owned(),
            (None, Some(port)) => format!("{name}:{port}"),
            (None, None) => name.to_owned(),
        };
        Ok(Self { client, runtime, base, user, location, host, opening, server })
    }

    /// Asks until there is an answer that is not about the moment. The first one has to come soon.
    fn ask(&self, method: &Method, path: &str, asked: &Asked) -> io::Result<Answer> {
        let mut last = None;
        let ask = self.ask_patiently(method, path, asked, &mut last);
        let answer = match self.opening.left() {
            None => self.runtime.block_on(ask),
            Some(left) => match self.runtime.block_on(async { tokio::time::timeout(left, ask).await }) {
                Ok(answer) => answer,
                Err(_) => Err(last.unwrap_or_else(|| network::late(&self.host, None))),
            },
        };
        if matches!(&answer, Ok(answer) if !is_of_the_moment(answer.status)) {
            self.opening.answered();
        }
        Ok(answer.map_err(|fault| fault.at(path))?)
    }

    async fn ask_patiently(
        &self,
        method: &Method,
        path: &str,
        asked: &Asked,
        last: &mut Option<Fault>,
    ) -> std::result::Result<Answer, Fault> {
        let mut pause = FIRST_PAUSE;
        let tries = if self.opening.left().is_some() { FIRST_TRIES } else { TRIES };
        for left in (0..=tries).rev() {
            // Its port may be somebody else's by now.
            if let Some(last) = self.server.as_ref().and_then(|server| server.ended.get()) {
                return Err(Fault::new(ErrorKind::Io, format!("rclone ended: {last}")));
            }
            match self.ask_once(method, path, asked).await {
                Ok(answer) if left == 0 || !is_of_the_moment(answer.status) => return Ok(answer),
                Ok(answer) => {
                    tracing::debug!(path, status = %answer.status, "trying again");
                    *last = Some(self.refused(method, answer.status));
                }
                Err(error) if left == 0 || !error.of_the_moment => return Err(error.why),
                Err(error) => {
                    tracing::debug!(path, why = %error.why, "trying again");
                    *last = Some(error.why);
                }
            }
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        }
        Err(Fault::new(ErrorKind::Io, "no try is left"))
    }

    fn unanswered(&self, error: reqwest::Error) -> Unanswered {
        let why = network::unanswered(&self.host, &error.without_url());
        Unanswered { of_the_moment: why.kind == ErrorKind::Unreachable, why }
    }

    async fn ask_once(
        &self,
        method: &Method,
        path: &str,
        asked: &Asked,
    ) -> std::result::Result<Answer, Unanswered> {
        let lasting = |why: String| Unanswered { why: Fault::new(ErrorKind::Io, why), of_the_moment: false };
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
        let mut response = request.send().await.map_err(|error| self.unanswered(error))?;
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let (status, length) = (response.status(), text(header::CONTENT_LENGTH));
        let (length, version) =
            (length.and_then(|text| text.parse().ok()), text(header::CONTENT_TYPE).unwrap_or("").to_owned());
        let most = match (asked.range, status) {
            (Some((first, last)), StatusCode::PARTIAL_CONTENT) => {
                last.saturating_sub(first).saturating_add(1)
            }
            _ => asked.most.map_or(LARGEST, |most| most.min(LARGEST)),
        };
        let mut content = BytesMut::new();
        while let Some(piece) = response.chunk().await.map_err(|error| self.unanswered(error))? {
            content.extend_from_slice(&piece);
            if content.len() as u64 > most {
                return Err(lasting(format!("the server sends more than {most} bytes")));
            }
        }
        Ok(Answer { status, length, version, content: content.freeze() })
    }

    /// What an answer that is no success means.
    fn refused(&self, method: &Method, status: StatusCode) -> Fault {
        let host = &self.host;
        let says = format!("{host} answers {status}");
        let reads = matches!(*method, Method::GET | Method::HEAD);
        match status {
            StatusCode::UNAUTHORIZED if self.user.is_some() => Fault::new(ErrorKind::Unauthorized, says)
                .next("check RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD: the server does not know that user, or that password"),
            StatusCode::UNAUTHORIZED => Fault::new(ErrorKind::Unauthorized, says)
                .next("set RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD, since the server asks for a user"),
            StatusCode::FORBIDDEN if reads => Fault::new(ErrorKind::Unauthorized, says).next(
                "check the path in `repository`, and that the server lets this user in there (a private repository's path begins with the user's name)",
            ),
            StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED if !reads => {
                Fault::new(ErrorKind::TargetReadOnly, says)
                    .next("check whether the server only appends, or is read-only for this user")
            }
            StatusCode::INSUFFICIENT_STORAGE | StatusCode::PAYLOAD_TOO_LARGE => {
                Fault::new(ErrorKind::TargetFull, says).next("make room on the server, or raise this user's quota there")
            }
            StatusCode::BAD_REQUEST if self.base.scheme() == "http" && reads => {
                Fault::new(ErrorKind::InvalidInput, says)
                    .next("if the server speaks TLS, write https:// instead of http:// in `repository`")
            }
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => {
                Fault::new(ErrorKind::TargetForeign, says)
                    .next("check that this is the address of a restic REST server")
            }
            status if status.is_redirection() => Fault::new(ErrorKind::InvalidInput, says)
                .next("the server is elsewhere: write the address that it redirects to in `repository`"),
            status if status.is_server_error() => {
                let next = if self.server.is_some() {
                    "as the user that makes the backups, type: rclone lsd REMOTE:, to see what that answers"
                } else {
                    "see what the server's own log says, and try again later"
                };
                Fault::new(ErrorKind::Io, says).next(next)
            }
            _ => Fault::new(ErrorKind::Io, says),
        }
    }

    fn no_protocol(&self, why: &str) -> Fault {
        Fault::new(ErrorKind::TargetForeign, format!("what answers at {} {why}", self.host))
            .next("check that this is the address of a restic REST server (version 2 of its protocol)")
    }

    /// The length of a file; `None` if it is not there.
    fn length(&self, path: &str) -> io::Result<Option<u64>> {
        let answer = self.ask(&Method::HEAD, path, &Asked::default())?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => match answer.length {
                Some(length) => Ok(Some(length)),
                None => Err(self.no_protocol("does not tell how long a file is").at(path).into()),
            },
            status => Err(self.refused(&Method::HEAD, status).at(path).into()),
        }
    }

    fn get(&self, path: &str, range: Option<(u64, u64)>, most: Option<u64>) -> io::Result<Bytes> {
        let answer = self.ask(&Method::GET, path, &Asked { range, most, ..Asked::default() })?;
        match (answer.status, range) {
            (StatusCode::NOT_FOUND, _) => Err(not_found(path)),
            (StatusCode::OK, None) | (StatusCode::PARTIAL_CONTENT, Some(_)) => Ok(answer.content),
            // The whole file, since it knows no ranges.
            (StatusCode::OK, Some((first, last))) => {
                let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(answer.content.len());
                Ok(answer.content.slice(place(first)..place(last.saturating_add(1))))
            }
            (status, _) => Err(self.refused(&Method::GET, status).at(path).into()),
        }
    }
}

/// Whether the same request may be answered otherwise a moment later.
fn is_of_the_moment(status: StatusCode) -> bool {
    status.is_server_error()
        && status != StatusCode::INSUFFICIENT_STORAGE
        && status != StatusCode::NOT_IMPLEMENTED
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
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
        if answer.status.is_success() {
            Ok(())
        } else {
            Err(self.refused(&Method::POST, answer.status).into())
        }
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
            status => return Err(self.refused(&Method::GET, status).at(&path).into()),
        }
        let nothing = matches!(answer.content.trim_ascii(), b"" | b"null" | b"[]");
        if nothing {
            return Ok(Vec::new());
        }
        if answer.version != VERSION {
            return Err(self.no_protocol("does not speak restic's REST protocol").at(&path).into());
        }
        let entries: Vec<Entry> = serde_json::from_slice(&answer.content)
            .map_err(|error| self.no_protocol(&format!("sends a listing that is none: {error}")).at(&path))?;
        let files = entries.into_iter().filter(|entry| is_file_name(&entry.name));
        Ok(files.map(|entry| (entry.name, entry.size)).collect())
    }

    fn read_into(&self, folder: Folder, name: &str, content: &mut Vec<u8>) -> io::Result<()> {
        content.clear();
        content.extend_from_slice(&self.get(&path(folder, name), None, Some(folder.most()))?);
        Ok(())
    }

    fn read_part(&self, folder: Folder, name: &str, offset: u64, length: u64) -> io::Result<BytesMut> {
        let path = path(folder, name);
        let last = offset.saturating_add(length).saturating_sub(1);
        let got = self.get(&path, Some((offset, last)), None)?;
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
            status => Err(self.refused(&Method::POST, status).at(&path).into()),
        }
    }

    fn remove(&self, folder: Folder, name: &str) -> io::Result<()> {
        let path = path(folder, name);
        let answer = self.ask(&Method::DELETE, &path, &Asked::default())?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(()),
            status if status.is_success() => Ok(()),
            status => Err(self.refused(&Method::DELETE, status).at(&path).into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
        sync::mpsc,
        thread,
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
        let large = answer("200 OK", "x", &"x".repeat((1 << 20) + 1));
        let (url, told) = scripted(&[&large, &much, elsewhere, endless]);
        with(&url, |store| {
            let key = store.read(Folder::Keys, NAME).unwrap_err();
            assert!(key.to_string().contains("more than 1048576 bytes"), "{key}");
            let more = store.read_part(Folder::Data, NAME, 0, 2).unwrap_err();
            assert!(more.to_string().contains("more than 2 bytes"), "{more}");
            // A POST that is sent elsewhere is a GET there, and nothing is written.
            let moved = store.write(Folder::Data, NAME, &[Bytes::from_static(b"a")]).unwrap_err();
            assert!(moved.to_string().contains("301"), "{moved}");
            // Of unknown length is not the same as not there.
            assert!(store.list(Folder::Config).is_err());
        })
        .await;
        assert_eq!(told.iter().count(), 4, "each was asked once");
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
            let error = RestStore::rest(bad).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.what_next().unwrap().contains("rest:https://HOST"), "{error}");
            assert!(!error.to_string().contains("me:canary"), "{error}");
        }
    }
}
