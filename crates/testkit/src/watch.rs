//! Cleans up after a test that was killed, and so could not.

use anyhow::{Context as _, Result};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

/// What to do once the other end of standard input is gone. It outlives what a terminal sends to all of us at once. QEMU is
/// found by the guest's directory, which no other process of that name has among its arguments.
const SCRIPT: &str = r#"trap '' INT TERM HUP
cat > /dev/null
for process in /proc/[0-9]*; do
  case "$(tr '\0' ' ' < "$process/cmdline")" in
    qemu-system-*"$1/"*) kill -9 "${process#/proc/}" ;;
  esac
done
[ -z "$2" ] || { umount -l "$2"; rmdir "$2"; }
rm -rf "$1"
"#;

/// A shell that waits for the end of this process, then ends QEMU and removes the guest's directory. Dropping it ends
/// the shell, and nothing else.
#[derive(Debug)]
pub(crate) struct Watch(Child);

impl Watch {
    pub(crate) fn over(work: &Path, mount: Option<&Path>) -> Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT, "stillpoint-watch"]).arg(work).arg(mount.unwrap_or(Path::new("")));
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(shell.spawn().context("start sh")?))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Before its standard input ends, which is what it waits for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
