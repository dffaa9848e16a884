//! The kernel's own NBD client (`include/uapi/linux/nbd-netlink.h`): one end of a socket pair is handed to it over generic
//! netlink, and it picks a free device itself. No helper program, no number to guess, no handshake to be had.
//!
//! The kernel looks for partitions on each new device, and udev for file systems. Neither may read what a guest wrote, so
//! until both are done the device is all zeroes.

use crate::volume::ServedVolume;
use async_trait::async_trait;
use bytes::Bytes;
use neli::{
    consts::{nl::NlmF, socket::NlFamily},
    genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder, NoUserHeader},
    nl::NlPayload,
    router::synchronous::NlRouter,
    types::{Buffer, GenlBuffer},
    utils::Groups,
};
use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use stillpoint_model::{Extent, Length, Offset, Range};
use stillpoint_nbd::server::{Export, Refusal, serve_transmission};
use tokio::task::JoinHandle;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
/// `NBD_FLAG_HAS_FLAGS`, `NBD_FLAG_SEND_TRIM`. Not read-only, since then the kernel would not trim.
const FLAGS: u64 = 1 | 1 << 5;
/// Seconds after which a request that nobody answers is an error for whoever made it.
const REQUEST_TIMEOUT: u64 = 120;
/// How long a device may take to come or go.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether this kernel has NBD, and lets us.
pub(super) fn is_there() -> bool {
    if !Path::new("/sys/module/nbd").exists() {
        let _ = Command::new("modprobe").args(["-q", "nbd"]).output();
    }
    Path::new("/sys/module/nbd").exists() && family().is_ok()
}

fn wrong(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

fn family() -> io::Result<(NlRouter, u16)> {
    let (router, _) = NlRouter::connect(NlFamily::Generic, None, Groups::empty()).map_err(wrong)?;
    let family = router.resolve_genl_family("nbd").map_err(wrong)?;
    Ok((router, family))
}

type Attribute = Nlattr<u16, Buffer>;

fn attribute(kind: u16, payload: impl neli::Size + neli::ToBytes) -> io::Result<Attribute> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build().map_err(wrong)?;
    NlattrBuilder::default().nla_type(kind).nla_payload(payload).build().map_err(wrong)
}

/// Says it, and returns the device's number if the kernel tells one.
fn tell(command: u8, attributes: Vec<Attribute>) -> io::Result<Option<u32>> {
    let (router, family) = family()?;
    let message = GenlmsghdrBuilder::<u8, u16, NoUserHeader>::default()
        .cmd(command)
        .version(1)
        .attrs(attributes.into_iter().collect::<GenlBuffer<_, _>>())
        .build()
        .map_err(wrong)?;
    let replies = router
        .send::<_, _, u16, Genlmsghdr<u8, u16>>(family, NlmF::ACK, NlPayload::Payload(message))
        .map_err(wrong)?;
    let mut index = None;
    for reply in replies {
        let reply = reply.map_err(wrong)?;
        if let NlPayload::Payload(payload) = reply.nl_payload() {
            index = payload.attrs().get_attr_handle().get_attr_payload_as::<u32>(INDEX).ok().or(index);
        }
    }
    Ok(index)
}

/// A disk as `/dev/nbdN`.
pub(crate) struct KernelNbd {
    index: u32,
    path: PathBuf,
    server: JoinHandle<()>,
}

impl KernelNbd {
    pub(super) async fn connect(directory: &Path, volume: &Arc<ServedVolume>) -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let blank = Arc::new(Blank { volume: Arc::clone(volume), done: AtomicBool::new(false) });
        let ours = tokio::net::UnixStream::from_std(ours)?;
        let export = Arc::clone(&blank) as Arc<dyn Export>;
        let server = tokio::spawn(async move {
            if let Err(error) = serve_transmission(ours, export).await {
                tracing::debug!(%error, "the kernel's NBD client ended");
            }
        });
        let size = volume.size().get();
        let identifier = format!("{}/{}", directory.display(), volume.name);
        let connected = tokio::task::spawn_blocking(move || -> io::Result<(u32, PathBuf)> {
            let descriptor = u32::try_from(theirs.as_raw_fd()).map_err(wrong)?;
            let item =
                attribute(SOCK_ITEM, Buffer::new())?.nest(&attribute(SOCK_FD, descriptor)?).map_err(wrong)?;
            let sockets = attribute(SOCKETS, Buffer::new())?.nest(&item).map_err(wrong)?;
            let block = if size.is_multiple_of(4096) { 4096_u64 } else { 512 };
            let index = tell(
                CONNECT,
                vec![
                    attribute(SIZE_BYTES, size)?,
                    attribute(BLOCK_SIZE_BYTES, block)?,
                    attribute(TIMEOUT, REQUEST_TIMEOUT)?,
                    attribute(SERVER_FLAGS, FLAGS)?,
                    // Whatever becomes of us, no device is kept for a server that is gone.
                    attribute(DEAD_CONN_TIMEOUT, 1_u64)?,
                    attribute(CLIENT_FLAGS, 0_u64)?,
                    attribute(BACKEND_IDENTIFIER, identifier)?,
                    sockets,
                ],
            )?;
            let index = index.ok_or_else(|| io::Error::other("the kernel does not tell which device"))?;
            let path = PathBuf::from(format!("/dev/nbd{index}"));
            await_device(&path, size)?;
            Ok((index, path))
        });
        let (index, path) = match connected.await.map_err(wrong)? {
            Ok(connected) => connected,
            Err(error) => {
                server.abort();
                return Err(error);
            }
        };
        blank.done.store(true, Ordering::Release);
        let ahead = if volume.has_map() { "0" } else { "4096" };
        let _ = fs::write(format!("/sys/block/nbd{index}/queue/read_ahead_kb"), ahead);
        Ok(Self { index, path, server })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the device back, and waits until it is gone.
    pub(super) async fn disconnect(self) {
        let index = self.index;
        let gone = tokio::task::spawn_blocking(move || disconnect(index)).await;
        self.server.abort();
        match gone {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, device = %self.path.display(), "was not disconnected"),
            Err(error) => tracing::warn!(%error, "a device was not disconnected"),
        }
    }
}

fn disconnect(index: u32) -> io::Result<()> {
    tell(DISCONNECT, vec![attribute(INDEX, index)?])?;
    let pid = PathBuf::from(format!("/sys/block/nbd{index}/pid"));
    let deadline = Instant::now() + PATIENCE;
    while pid.exists() {
        if Instant::now() > deadline {
            return Err(io::Error::other("it is still connected"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until the device has its size and nobody else looks at it any more, and leaves nothing of it in the cache.
fn await_device(path: &Path, size: u64) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The first to open it makes the kernel look for partitions, if it has not yet. Its cache goes with the last to
        // close it.
        let found = File::open(path).and_then(|mut file| io::Seek::seek(&mut file, io::SeekFrom::End(0)));
        match found {
            Ok(found) if found == size => break,
            _ if Instant::now() > deadline => {
                return Err(io::Error::other(format!("{} does not come up: {found:?}", path.display())));
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    if Path::new("/run/udev/control").exists() {
        let _ = Command::new("udevadm").args(["settle", "--timeout=10"]).output();
    }
    Ok(())
}

/// Disconnects what a run that has died left: devices whose backend identifier is of its directory.
pub(super) fn disconnect_all(directory: &Path) {
    let Ok(devices) = fs::read_dir("/sys/block") else { return };
    for entry in devices.flatten() {
        let name = entry.file_name();
        let Some(index) = name.to_str().and_then(|name| name.strip_prefix("nbd")?.parse().ok()) else {
            continue;
        };
        let backend = fs::read_to_string(entry.path().join("backend")).unwrap_or_default();
        if Path::new(backend.trim()).starts_with(directory)
            && let Err(error) = disconnect(index)
        {
            tracing::warn!(%error, index, "an NBD device of an earlier run was not disconnected");
        }
    }
}

/// The disk, or zeroes until it is handed over.
struct Blank {
    volume: Arc<ServedVolume>,
    done: AtomicBool,
}

#[async_trait]
impl Export for Blank {
    fn size(&self) -> Length {
        self.volume.size()
    }

    fn dirty_context(&self) -> Option<&str> {
        None
    }

    async fn read(&self, range: Range) -> Result<Bytes, Refusal> {
        if self.done.load(Ordering::Acquire) {
            return Export::read(self.volume.as_ref(), range).await;
        }
        Ok(Bytes::from(vec![0; usize::try_from(range.length().get()).unwrap_or(0)]))
    }

    async fn extents(&self, from: Offset) -> Result<Vec<Extent>, Refusal> {
        Export::extents(self.volume.as_ref(), from).await
    }

    async fn trim(&self, range: Range) -> Result<(), Refusal> {
        self.volume.trim(range).await
    }
}
