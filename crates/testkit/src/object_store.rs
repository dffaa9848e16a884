//! A real S3 server in this process, with the faults that object stores and networks have.

use anyhow::{Context as _, Result};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use std::{
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

/// The bucket that there is.
pub const BUCKET: &str = "bucket";
/// Its access key.
pub const ACCESS_KEY: &str = "canary-access-key";
/// The secret to it.
pub const SECRET_KEY: &str = "canary-secret-key";

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Each so many-th request is answered with status 500.
    ErrorEvery(u64),
    /// Every request is.
    ErrorAlways,
    /// Each so many-th connection on which 200 KiB came in is cut then.
    CutEvery(u64),
    /// Every request waits first.
    Slow(Duration),
    /// What is there can be neither overwritten nor deleted.
    AppendOnly,
}

struct Shared {
    fault: Mutex<Fault>,
    requests: AtomicU64,
    /// Connections that something large came in on, as long as some of them are cut.
    large: AtomicU64,
    faults: AtomicU64,
}

impl Shared {
    fn fault(&self) -> Fault {
        self.fault.lock().map_or(Fault::None, |fault| *fault)
    }
}

/// The server; it ends when this is dropped.
pub struct ObjectStore {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl ObjectStore {
    /// Serves `directory`, with one bucket in it.
    ///
    /// # Errors
    /// If it cannot.
    pub fn start(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory.join(BUCKET))?;
        let files = s3s_fs::FileSystem::new(directory)
            .map_err(|error| anyhow::anyhow!("serving files: {error:?}"))?;
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = builder.build();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).context("listening")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            fault: Mutex::new(Fault::None),
            requests: AtomicU64::new(0),
            large: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        });
        let (own, root) = (Arc::clone(&shared), directory.to_owned());
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (service, shared, root) = (service.clone(), Arc::clone(&own), root.clone());
                let stream = Stream { stream, shared: Arc::clone(&shared), number: None, received: 0 };
                tokio::spawn(async move {
                    let answer = service_fn(move |request: Request<Incoming>| {
                        let (service, shared) = (service.clone(), Arc::clone(&shared));
                        let there = root.join(request.uri().path().trim_start_matches('/')).is_file();
                        async move {
                            let refused = |status| {
                                shared.faults.fetch_add(1, Ordering::Relaxed);
                                let mut response = Response::new(s3s::Body::empty());
                                *response.status_mut() = status;
                                Ok(response)
                            };
                            let number = shared.requests.fetch_add(1, Ordering::Relaxed);
                            match shared.fault() {
                                Fault::ErrorAlways => return refused(StatusCode::INTERNAL_SERVER_ERROR),
                                Fault::ErrorEvery(each) if number.is_multiple_of(each) => {
                                    return refused(StatusCode::INTERNAL_SERVER_ERROR);
                                }
                                Fault::Slow(delay) => tokio::time::sleep(delay).await,
                                Fault::AppendOnly
                                    if there && [Method::PUT, Method::DELETE].contains(request.method()) =>
                                {
                                    return refused(StatusCode::FORBIDDEN);
                                }
                                _ => {}
                            }
                            hyper::service::Service::call(&service, request).await
                        }
                    });
                    let _ = Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        Ok(Self { address, shared, runtime: Some(runtime) })
    }

    /// Where it listens, as `http://HOST:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets this go wrong from now on.
    pub fn fail(&self, fault: Fault) {
        if let Ok(mut current) = self.shared.fault.lock() {
            *current = fault;
        }
    }

    /// How often something went wrong so far.
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }
}

impl Drop for ObjectStore {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A connection that may be cut.
struct Stream {
    stream: TcpStream,
    shared: Arc<Shared>,
    /// Which it is of those that something large came in on.
    number: Option<u64>,
    received: usize,
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.received = self.received.saturating_add(buffer.filled().len().saturating_sub(before));
        if let Fault::CutEvery(each) = self.shared.fault()
            && self.received > 200 << 10
            && {
                let next = || self.shared.large.fetch_add(1, Ordering::Relaxed);
                let number = self.number.unwrap_or_else(next);
                self.number = Some(number);
                number.is_multiple_of(each)
            }
        {
            self.shared.faults.fetch_add(1, Ordering::Relaxed);
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        polled
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
