//! Programs that are asked something: none may hang a run, nor print without end.

use std::{
    io::{self, Read},
    process::{Child, ExitStatus},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// How often a program that has said all is looked at until it has ended.
const LOOK: Duration = Duration::from_millis(10);

/// What came of a program.
pub(crate) enum Outcome {
    Ended(ExitStatus, Vec<u8>),
    /// It said more than was wanted, and was ended.
    TooMuch,
    /// It took too long, and was ended.
    Late,
}

/// Reads what `child` says through `pipe` to its end, at most `most` bytes, and waits until it has ended, at most for
/// `patience`.
pub(crate) fn outcome(
    mut child: Child,
    pipe: Option<impl Read + Send + 'static>,
    most: u64,
    patience: Duration,
) -> io::Result<Outcome> {
    let started = Instant::now();
    let (tell, told) = mpsc::channel();
    // Whoever inherited the pipe may keep it open for longer than the program lives.
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = pipe.map(|pipe| pipe.take(most.saturating_add(1)).read_to_end(&mut bytes));
        tell.send(read.transpose().map(|_| bytes))
    });
    let read = told.recv_timeout(patience);
    let kept = matches!(&read, Ok(Ok(bytes)) if bytes.len() as u64 <= most);
    while kept && started.elapsed() < patience {
        if let Some(status) = child.try_wait()? {
            return read.map_err(|_| io::ErrorKind::BrokenPipe)?.map(|bytes| Outcome::Ended(status, bytes));
        }
        thread::sleep(LOOK);
    }
    let _ = child.kill();
    let _ = child.wait();
    match read {
        Ok(Err(error)) => Err(error),
        Ok(Ok(_)) if !kept => Ok(Outcome::TooMuch),
        _ => Ok(Outcome::Late),
    }
}
