//! Signals: INT, TERM, HUP, QUIT and PIPE ask a run to end cleanly; a second one changes nothing, since the first is
//! already being followed as fast as the guest allows.
//!
//! The kernel sends PIPE to whoever writes to a peer that has gone, and the libraries below us do that in the middle of
//! good work: an object store closes a connection, the program behind a pipe ends. That is an error for them to handle.
//! What ends a run is PIPE from somebody else, or a closed standard output or standard error.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::{
    consts::SIGPIPE,
    iterator::{SignalsInfo, exfiltrator::WithOrigin},
};
use std::{io, os::fd::AsFd};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Tells whether a signal came.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    /// Listens from now on.
    ///
    /// # Errors
    /// If the kernel refuses a handler.
    pub(crate) fn listen() -> io::Result<Self> {
        let (sender, receiver) = watch::channel(false);
        for kind in
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()]
        {
            let mut signals = signal(kind)?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    sender.send_replace(true);
                }
            });
        }
        listen_for_pipe(move |ends| {
            if ends {
                sender.send_replace(true);
            }
        })?;
        Ok(Self(receiver))
    }

    /// Becomes true when a signal comes.
    pub(crate) fn receiver(&self) -> watch::Receiver<bool> {
        self.0.clone()
    }

    /// Whether a signal came.
    pub(crate) fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits for one.
    pub(crate) async fn wait(&mut self) {
        if self.0.wait_for(|set| *set).await.is_err() {
            // Nobody listens any more, so none will come.
            std::future::pending::<()>().await;
        }
    }
}

/// Tells `each` PIPE that comes, and whether it ends a run.
fn listen_for_pipe(mut each: impl FnMut(bool) + Send + 'static) -> io::Result<()> {
    let mut signals = SignalsInfo::<WithOrigin>::new([SIGPIPE])?;
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let listen = move || {
        for origin in &mut signals {
            let ours = origin.process.is_some_and(|process| process.pid == own);
            each(!ours || has_no_reader(io::stdout()) || has_no_reader(io::stderr()));
        }
    };
    std::thread::Builder::new().name("pipe-signal".into()).spawn(listen).map(drop)
}

/// Whether `output` is a pipe or a socket whose other end was closed (poll(2), POLLERR and POLLHUP).
fn has_no_reader(output: impl AsFd) -> bool {
    let mut polled = [PollFd::new(&output, PollFlags::OUT)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let gone = PollFlags::ERR | PollFlags::HUP;
    poll(&mut polled, Some(&at_once)).is_ok() && polled.iter().any(|fd| fd.revents().intersects(gone))
}

#[cfg(test)]
mod test {
    use super::*;
    use std::{os::unix::net::UnixStream, process::Command, sync::mpsc};

    #[test]
    fn a_peer_that_goes_ends_no_run_but_somebody_elses_signal_does() {
        let (sender, received) = mpsc::channel();
        listen_for_pipe(move |ends| sender.send(ends).unwrap()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        // As `writev` does, and unlike `send` of the standard library.
        assert_eq!(rustix::io::write(&ours, b"x").err(), Some(rustix::io::Errno::PIPE));
        assert!(!received.recv().unwrap());
        let own = std::process::id().to_string();
        assert!(Command::new("kill").args(["-s", "PIPE", &own]).status().unwrap().success());
        assert!(received.recv().unwrap());
    }

    #[test]
    fn an_output_that_nobody_reads_is_seen() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert!(!has_no_reader(&writer));
        drop(reader);
        assert!(has_no_reader(&writer));
        assert!(!has_no_reader(std::fs::File::create("/dev/null").unwrap()));
    }
}
