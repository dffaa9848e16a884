//! JSON-RPC 2.0 over a program's standard input and output, one message a line, in both directions.

use crate::protocol::{self, Call, ErrorData, Log, MOST_MESSAGE, ProgressNote};
use async_trait::async_trait;
use serde::Serialize;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{oneshot, watch},
};

/// Answers to what a program asks.
#[async_trait]
pub(crate) trait Handler: Send + Sync {
    async fn answer(&self, method: &str, params: Value) -> Result<Value>;
}

type Answer = Result<Value, Value>;

/// One side of the conversation.
pub(crate) struct Peer {
    name: String,
    writer: tokio::sync::Mutex<Option<UnixStream>>,
    pending: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    next: AtomicU64,
    /// Why there is nothing more to come, once that is so.
    over: watch::Sender<Option<String>>,
    activity: Activity,
}

/// When something was last heard of the program.
#[derive(Clone)]
pub(crate) struct Activity(Arc<(Instant, AtomicU64)>);

impl Activity {
    pub(crate) fn new() -> Self {
        Self(Arc::new((Instant::now(), AtomicU64::new(0))))
    }

    pub(crate) fn seen(&self) {
        let (start, last) = &*self.0;
        last.store(u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn since(&self) -> Duration {
        let (start, last) = &*self.0;
        start.elapsed().saturating_sub(Duration::from_millis(last.load(Ordering::Relaxed)))
    }

    /// Waits until nothing has been heard for `most`.
    pub(crate) async fn quiet_for(&self, most: Duration) {
        while let Some(rest) = most.checked_sub(self.since()).filter(|rest| !rest.is_zero()) {
            tokio::time::sleep(rest).await;
        }
    }
}

impl Peer {
    pub(crate) fn new(name: String, writer: UnixStream, activity: Activity) -> Arc<Self> {
        let (over, _) = watch::channel(None);
        Arc::new(Self {
            name,
            writer: tokio::sync::Mutex::new(Some(writer)),
            pending: Mutex::default(),
            next: AtomicU64::new(1),
            over,
            activity,
        })
    }

    /// Asks, and waits no longer than `deadline`.
    ///
    /// # Errors
    /// What the program answers, with its kind; [`ErrorKind::Io`] if there is no answer.
    pub(crate) async fn call<C: Call>(&self, call: &C, deadline: Duration) -> Result<C::Answer> {
        match tokio::time::timeout(deadline, self.ask(call)).await {
            Ok(answer) => answer,
            Err(_) => {
                Err(self.error(format!("does not answer {} within {} s", C::METHOD, deadline.as_secs())))
            }
        }
    }

    /// Asks, and waits for as long as it takes or the program is there.
    pub(crate) async fn ask<C: Call>(&self, call: &C) -> Result<C::Answer> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.lock_pending().insert(id, sender);
        let request = json!({"jsonrpc": "2.0", "id": id, "method": C::METHOD, "params": call});
        let mut over = self.over.subscribe();
        let ended = async {
            match over.wait_for(Option::is_some).await {
                Ok(why) => why.clone().unwrap_or_default(),
                Err(_) => String::new(),
            }
        };
        // An answer that came before the end counts.
        let answer = tokio::select! {
            biased;
            answer = async { self.send(&request).await?; receiver.await.map_err(|_| self.error("has gone")) } => answer,
            why = ended => Err(self.error(why)),
        };
        self.lock_pending().remove(&id);
        match answer? {
            Ok(value) => serde_json::from_value(value).map_err(|error| {
                self.error(format!("answers {} with something that is no answer to it", C::METHOD))
                    .because(error)
            }),
            Err(error) => Err(self.told(C::METHOD, &error)),
        }
    }

    /// The program's own error.
    fn told(&self, method: &str, error: &Value) -> Error {
        let message = error.get("message").and_then(Value::as_str).unwrap_or("no message");
        let message = line(message, 1000);
        let data = error.get("data").cloned().and_then(|data| serde_json::from_value::<ErrorData>(data).ok());
        let (kind, next) = data.map_or((ErrorKind::Io, None), |data| (data.kind, data.next));
        let told = Error::new(kind, format!("{}: {method}", self.name)).because(Told(message));
        match next.map(|next| line(&next, 300)).filter(|next| !next.is_empty()) {
            Some(next) => told.next(next),
            None => told,
        }
    }

    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::Io, format!("{} {what}", self.name))
    }

    /// Says something that has no answer. That it cannot be said is found out otherwise.
    pub(crate) async fn notify(&self, method: &str, params: &impl Serialize) {
        let message = json!({"jsonrpc": "2.0", "method": method, "params": params});
        let _ = tokio::time::timeout(Duration::from_secs(1), self.send(&message)).await;
    }

    async fn send(&self, message: &Value) -> Result<()> {
        let mut line = serde_json::to_vec(message).map_err(|error| self.error("").because(error))?;
        line.push(b'\n');
        let mut writer = self.writer.lock().await;
        let stream = writer.as_mut().ok_or_else(|| self.error("is being ended"))?;
        let written = stream.write_all(&line).await;
        if written.is_err() {
            // Part of a line may be on its way; nothing more can be said.
            *writer = None;
        }
        written.map_err(|error| self.error("does not take what it is told").because(error))
    }

    /// Closes the program's standard input, which tells it to end.
    pub(crate) async fn close(&self) {
        if let Ok(mut writer) = tokio::time::timeout(Duration::from_millis(200), self.writer.lock()).await {
            *writer = None;
        }
    }

    fn lock_pending(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says why nothing more comes.
    pub(crate) fn end(&self, why: impl Into<String>) {
        self.over.send_if_modified(|over| {
            let first = over.is_none();
            over.get_or_insert(why.into());
            first
        });
    }

    /// Reads what the program says until it ends or says nonsense.
    pub(crate) async fn listen(
        self: Arc<Self>,
        mut output: impl AsyncBufRead + Unpin,
        handler: Arc<dyn Handler>,
    ) {
        let why = loop {
            match read_line(&mut output).await {
                Ok(Some(line)) => {
                    self.activity.seen();
                    if let Err(why) = self.take(&line, &handler) {
                        break why;
                    }
                }
                Ok(None) => break "has closed its standard output".to_owned(),
                Err(why) => break why,
            }
        };
        self.end(why);
    }

    fn take(self: &Arc<Self>, line: &[u8], handler: &Arc<dyn Handler>) -> Result<(), String> {
        let shown = || {
            let text =
                String::from_utf8_lossy(line.get(..line.len().min(80)).unwrap_or_default()).into_owned();
            format!("says something that is no message: {:?}", text.trim_end())
        };
        let message: Value = serde_json::from_slice(line).map_err(|_| shown())?;
        let method = message.get("method").and_then(Value::as_str).map(str::to_owned);
        let params = message.get("params").cloned().unwrap_or(Value::Null);
        match (method, message.get("id").cloned()) {
            (Some(method), None) => self.note(&method, params),
            (Some(method), Some(id)) => {
                let (peer, handler) = (Arc::clone(self), Arc::clone(handler));
                tokio::spawn(async move {
                    let answer = match handler.answer(&method, params).await {
                        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
                        Err(error) => {
                            let data = ErrorData { kind: error.kind(), next: None };
                            let error = json!({"code": -32000, "message": chain(&error), "data": data});
                            json!({"jsonrpc": "2.0", "id": id, "error": error})
                        }
                    };
                    let _ = peer.send(&answer).await;
                });
            }
            (None, Some(id)) => {
                let waiting = id.as_u64().and_then(|id| self.lock_pending().remove(&id));
                let Some(waiting) = waiting else {
                    // To a call that was given up; it is late, not wrong.
                    tracing::debug!(provider = self.name, %id, "an answer to nothing");
                    return Ok(());
                };
                let answer = match (message.get("result"), message.get("error")) {
                    (Some(result), None) => Ok(result.clone()),
                    (_, Some(error)) => Err(error.clone()),
                    (None, None) => return Err(shown()),
                };
                let _ = waiting.send(answer);
            }
            (None, None) => return Err(shown()),
        }
        Ok(())
    }

    fn note(&self, method: &str, params: Value) {
        let provider = &self.name;
        match method {
            "log" => {
                let Ok(log) = serde_json::from_value::<Log>(params) else { return };
                let message: String = log.message.chars().filter(|c| !c.is_control()).take(2000).collect();
                match log.level.as_str() {
                    "error" => tracing::error!("{provider}: {message}"),
                    "warning" => tracing::warn!("{provider}: {message}"),
                    "debug" => tracing::debug!("{provider}: {message}"),
                    _ => tracing::info!("{provider}: {message}"),
                }
            }
            "progress" => {
                if let Ok(progress) = serde_json::from_value::<ProgressNote>(params) {
                    let message: String =
                        progress.message.chars().filter(|c| !c.is_control()).take(200).collect();
                    tracing::debug!("{provider}: {message}");
                }
            }
            // A later version of the protocol may have more to say.
            _ => tracing::debug!(provider, method, "an unknown notification"),
        }
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

/// What a program says, for a terminal.
fn line(text: &str, most: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(most).collect()
}

/// A line of at most [`MOST_MESSAGE`] bytes; `None` at the end.
async fn read_line(output: &mut (impl AsyncBufRead + Unpin)) -> Result<Option<Vec<u8>>, String> {
    let mut line = Vec::new();
    loop {
        let chunk = output.fill_buf().await.map_err(|error| format!("cannot be read: {error}"))?;
        if chunk.is_empty() {
            return Ok(if line.is_empty() { None } else { Some(line) });
        }
        let (taken, complete) = match chunk.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (chunk.len(), false),
        };
        if line.len().saturating_add(taken) > MOST_MESSAGE {
            return Err(format!("sends a message of more than {MOST_MESSAGE} bytes"));
        }
        line.extend_from_slice(chunk.get(..taken).unwrap_or_default());
        output.consume(taken);
        if complete {
            return Ok(Some(line));
        }
    }
}

/// The program's own words.
#[derive(Debug)]
struct Told(String);

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Told {}

/// Whether an error is the program's own, and not one of the conversation with it.
pub(crate) fn is_told(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<Told>())
}

/// What a program asks for by its own requests.
pub(crate) enum Asked {
    Regions(protocol::NextDirtyRegions),
    Release(protocol::Release),
}

impl Asked {
    pub(crate) fn parse(method: &str, params: Value) -> Result<Self> {
        let wrong = |error: serde_json::Error| {
            Error::new(ErrorKind::InvalidInput, format!("the parameters of {method} are wrong"))
                .because(error)
        };
        match method {
            protocol::NextDirtyRegions::METHOD => {
                serde_json::from_value(params).map(Self::Regions).map_err(wrong)
            }
            protocol::Release::METHOD => serde_json::from_value(params).map(Self::Release).map_err(wrong),
            _ => Err(Error::new(ErrorKind::Unsupported, "there is no such method")),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[tokio::test]
    async fn each_kind_of_error_comes_through_with_what_to_do_next() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let peer = Peer::new("provider x".into(), stream, Activity::new());
        let schema = serde_json::to_value(schemars::schema_for!(ErrorKind)).unwrap();
        let kinds: Vec<_> =
            schema["oneOf"].as_array().unwrap().iter().map(|kind| kind["const"].clone()).collect();
        for new in ["target-foreign", "unauthorized", "unreachable", "invalid-input", "unsupported"] {
            assert!(kinds.iter().any(|kind| kind == new), "{new}: {kinds:?}");
        }
        for kind in kinds {
            let data = json!({"kind": kind, "next": "renew\u{1b}[2J the token"});
            let error = peer.told("job_init", &json!({"code": -32000, "message": "no", "data": data}));
            assert_eq!(serde_json::to_value(error.kind()).unwrap(), kind);
            assert_eq!(error.what_next(), Some("renew[2J the token"));
            assert!(is_told(&error));
        }
        let unknown = peer.told("job_init", &json!({"message": "no", "data": {"kind": "from-the-future"}}));
        assert_eq!((unknown.kind(), unknown.what_next()), (ErrorKind::Io, None));
    }
}
