//! The guest's own power-off, held up while a run needs its QEMU.
//!
//! A guest that shuts down ends its QEMU, and with it the old data that the run keeps aside. `set-action shutdown=pause`
//! keeps both until the run has ended; then the guest's wish is granted. QEMU does not tell what the action was before,
//! but its command line does (`-no-shutdown`, `-action`).

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    inspect::{ask, qmp_error},
};
use serde_json::Value;
use stillpoint_qmp::{ErrorKind as QmpErrorKind, Qmp};

/// Whether a power-off of the guest would end its QEMU; `None` if that cannot be seen from here.
pub(crate) fn ends_qemu(qmp: &Qmp) -> Option<bool> {
    let line = std::fs::read(format!("/proc/{}/cmdline", qmp.peer_pid()?)).ok()?;
    let line: Vec<String> =
        line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    // libvirt makes the sockets of its QEMUs, so the process behind one may be no QEMU at all.
    line.first()
        .is_some_and(|program| program.contains("qemu") || program.contains("kvm"))
        .then(|| powers_off(&line))
}

fn powers_off(line: &[String]) -> bool {
    let mut powers_off = true;
    for (index, word) in line.iter().enumerate() {
        match word.strip_prefix("--").or_else(|| word.strip_prefix('-')) {
            Some("no-shutdown") => powers_off = false,
            Some("action") => {
                let value = line.get(index.saturating_add(1)).map_or("", String::as_str);
                for pair in value.split(',') {
                    if let Some(("shutdown", action)) = pair.split_once('=') {
                        powers_off = action != "pause";
                    }
                }
            }
            _ => {}
        }
    }
    powers_off
}

/// Makes QEMU outlive the guest's power-off.
pub(crate) async fn hold(qmp: &Qmp) -> Result<()> {
    let held = qmp.execute(command::set_shutdown_action("pause")).await;
    held.map(|_| ()).map_err(|error| qmp_error("hold up a power-off of the guest", error))
}

/// Undoes [`hold`], and ends QEMU if the guest has powered itself off meanwhile; tells whether it has.
pub(crate) async fn settle(qmp: &Qmp) -> Result<bool> {
    let back = qmp.execute(command::set_shutdown_action("poweroff")).await;
    back.map_err(|error| qmp_error("let the guest power itself off again", error))?;
    let status: Value = ask(qmp, command::query_status()).await?;
    if status.get("status").and_then(Value::as_str) != Some("shutdown") {
        return Ok(false);
    }
    match qmp.execute(command::quit()).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == QmpErrorKind::Disconnected => Ok(true),
        Err(error) => Err(Error::new(
            ErrorKind::LeftBehind,
            "the guest has powered itself off, and QEMU does not end; type `quit` on its monitor",
        )
        .because(error)),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_command_line_tells_what_a_power_off_does() {
        let line = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(powers_off(&line("qemu-system-x86_64 -m 256 -no-reboot")));
        assert!(!powers_off(&line("qemu-system-x86_64 -no-shutdown")));
        assert!(!powers_off(&line("qemu-system-x86_64 --no-shutdown -m 1")));
        assert!(!powers_off(&line("qemu -action reboot=shutdown,shutdown=pause")));
        assert!(powers_off(&line("qemu -no-shutdown -action shutdown=poweroff")), "the last one counts");
        assert!(powers_off(&line("qemu -action panic=pause")));
    }
}
