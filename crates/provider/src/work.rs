//! Work that computes or waits for storage, beside what must answer at once.

use crate::{Error, ErrorKind, Result};

/// How much less than everybody else (0) the threads of such work want the processor; 19 is the most. A backup uses all cores for
/// hashing and compressing, and a guest's processors and QEMU are ordinary threads beside it: when they wake, they go first (I5).
/// What answers QEMU's monitor is not among these threads.
const NICE: i32 = 10;

/// Runs blocking `work` on a thread made for it, which stands back for others. A panic there ends this call and not the process;
/// `broken` says what must have been wrong with what was read.
///
/// # Errors
/// Those of `work`; [`ErrorKind::Cancelled`] if the runtime is ending; [`ErrorKind::Damaged`] after a panic.
///
/// # Cancellation
/// Work that has begun goes on.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
    broken: &str,
) -> Result<T> {
    let standing_back = move || {
        // Of this thread alone, which does nothing else. Where it may not be, it is only less kind.
        let _ = rustix::process::setpriority_process(None, NICE);
        work()
    };
    match tokio::task::spawn_blocking(standing_back).await {
        Ok(result) => result,
        Err(join) if join.is_cancelled() => Err(Error::new(ErrorKind::Cancelled, "the run is ending")),
        Err(join) => Err(Error::new(ErrorKind::Damaged, broken).because(join)),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[tokio::test]
    async fn it_stands_back_and_a_panic_is_an_error() {
        let nice = || rustix::process::getpriority_process(None).map_err(|_| Error::new(ErrorKind::Io, "?"));
        let before = nice().unwrap();
        let there = blocking(nice, "").await.unwrap();
        assert!(there >= NICE.max(before), "{there}");
        assert_eq!(nice().unwrap(), before, "nobody else does");
        let error = blocking::<()>(|| panic!("as a test"), "it broke").await.unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Damaged, "it broke"));
    }
}
