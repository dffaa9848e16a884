//! The unix socket under a monitor or an agent.

use crate::error::{Error, ErrorKind, Result};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
        SocketType,
    },
};
use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};
use tokio::{io::Interest, net::UnixStream};

/// How often a listener's full queue is tried again: the kernel offers nothing to wait for.
const RETRY: Duration = Duration::from_millis(50);

/// When `wait` will be over. A wait that no clock can count, such as [`Duration::MAX`], is as good as 30 years.
pub(crate) fn deadline(wait: Duration) -> tokio::time::Instant {
    const LONGEST: Duration = Duration::from_secs(30 * 365 * 86_400);
    tokio::time::Instant::now() + wait.min(LONGEST)
}

/// Connects by `deadline`.
pub(crate) async fn open(path: &Path, deadline: tokio::time::Instant) -> Result<UnixStream> {
    let address = SocketAddrUnix::new(path).map_err(|error| failed(path, error))?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|error| failed(path, error))?;
        // Not tokio's connect, which takes the EAGAIN of a full queue for a connection that is under way.
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                return UnixStream::from_std(socket.into()).map_err(|error| {
                    Error::new(ErrorKind::Io, format!("{} cannot be watched", path.display())).because(error)
                });
            }
            Err(Errno::INTR) => {}
            Err(error @ Errno::AGAIN) => {
                if tokio::time::Instant::now() + RETRY > deadline {
                    return Err(failed(path, error));
                }
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(failed(path, error)),
        }
    }
}

fn failed(path: &Path, error: Errno) -> Error {
    let path = path.display();
    let (kind, context) = match error {
        Errno::NOENT | Errno::NOTDIR => (ErrorKind::NoSocket, format!("there is no socket at {path}")),
        Errno::CONNREFUSED => (ErrorKind::Refused, format!("nobody listens on the socket at {path}")),
        Errno::ACCESS | Errno::PERM => {
            (ErrorKind::Permission, format!("the socket at {path} may not be used"))
        }
        Errno::AGAIN => (
            ErrorKind::Busy,
            format!("too many clients already wait for the socket at {path}, which serves one"),
        ),
        _ => (ErrorKind::Io, format!("{path} cannot be connected to")),
    };
    Error::new(kind, context).because(io::Error::from(error))
}

/// The process that made the listening socket; `None` if it is not in our pid namespace.
pub(crate) fn peer_pid(stream: &UnixStream) -> Option<u32> {
    let pid = stream.peer_cred().ok()?.pid()?;
    u32::try_from(pid).ok().filter(|pid| *pid > 0)
}

/// Writes all of `bytes`, the first of them together with `fd`; returns when that one was about to be handed over.
///
/// # Cancellation
/// Dropping the future may leave a part of `bytes` written.
pub(crate) async fn send(stream: &UnixStream, bytes: &[u8], mut fd: Option<OwnedFd>) -> io::Result<Instant> {
    let mut began = None;
    let mut rest = bytes;
    while !rest.is_empty() {
        let mut now = Instant::now();
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                now = Instant::now();
                send_some(stream, rest, fd.as_ref())
            })
            .await?;
        // However little was taken, the descriptor went with it. The kernel keeps it alive from here.
        fd = None;
        began.get_or_insert(now);
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(began.unwrap_or_else(Instant::now))
}

fn send_some(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds
        && !control.push(SendAncillaryMessage::ScmRights(fds))
    {
        return Err(io::Error::other("no room for a descriptor"));
    }
    Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod test {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn what_the_kernel_refuses_has_its_own_kinds() {
        for (errno, kind) in [
            (Errno::NOENT, ErrorKind::NoSocket),
            (Errno::CONNREFUSED, ErrorKind::Refused),
            (Errno::ACCESS, ErrorKind::Permission),
            (Errno::PERM, ErrorKind::Permission),
            (Errno::AGAIN, ErrorKind::Busy),
            (Errno::NAMETOOLONG, ErrorKind::Io),
        ] {
            let error = failed(Path::new("/run/qmp"), errno);
            assert_eq!(error.kind(), kind);
            assert!(
                error.to_string().contains("/run/qmp") && !error.to_string().contains("os error"),
                "{error}"
            );
            assert!(error.source().is_some());
        }
    }

    #[test]
    fn a_wait_without_end_has_a_deadline() {
        assert!(deadline(Duration::MAX) > deadline(Duration::from_secs(86_400)));
    }
}
