//! Numbers as people read them, and output that survives a closed pipe.

use std::{io::Write as _, time::Duration};
use stillpoint_model::Length;

/// `1.5 GiB`, three significant digits.
pub(crate) fn bytes(length: Length) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = length.get() as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1000.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    let digits = match value {
        _ if unit == "B" => 0,
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}

/// `850 ms`, `12.3 s`, `4 min 05 s`, `3 h 20 min`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// `200 MiB in 1.5 s (133 MiB/s)`. Of little nothing is said of a speed, which would be that of everything else.
pub(crate) fn throughput(length: Length, elapsed: Duration) -> String {
    let time = duration(elapsed);
    match length.get() {
        0 => format!("nothing in {time}"),
        1..0x10_0000 => format!("{} in {time}", bytes(length)),
        _ => format!("{} in {time} ({}/s)", bytes(length), bytes(crate::progress::rate(length, elapsed))),
    }
}

/// Milliseconds with one digit behind the point.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}

/// Prints a line to stdout. A reader that went away (`| head`) is no error of ours.
pub(crate) fn print(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints a line to stderr.
pub(crate) fn note(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn bytes_have_three_digits() {
        for (number, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1536, "1.50 KiB"),
            (64 << 20, "64.0 MiB"),
            (1000 << 20, "0.98 GiB"),
            (16 << 30, "16.0 GiB"),
        ] {
            assert_eq!(bytes(Length::new(number)), text);
        }
    }

    #[test]
    fn a_speed_is_told_of_what_has_one() {
        let told = |bytes, millis| throughput(Length::new(bytes), Duration::from_millis(millis));
        assert_eq!(told(0, 142), "nothing in 142 ms");
        assert_eq!(told(64 << 10, 142), "64.0 KiB in 142 ms");
        assert_eq!(told(200 << 20, 2000), "200 MiB in 2.0 s (100 MiB/s)");
    }

    #[test]
    fn durations_have_the_unit_that_fits() {
        for (millis, text) in
            [(8, "8 ms"), (1_500, "1.5 s"), (245_000, "4 min 05 s"), (12_000_000, "3 h 20 min")]
        {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
    }
}
