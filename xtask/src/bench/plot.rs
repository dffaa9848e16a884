//! Pictures of the figures, as SVG: bars beside the peers, the guest's latency over time, time against size.

use super::report::{Curve, Report, Timeline};
use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const FONT: &str = "font-family='sans-serif' font-size='13'";
const OURS: &str = "#1f6f8b";
const OTHERS: &str = "#b8b8b8";
const COLOURS: [&str; 4] = ["#1f6f8b", "#c8553d", "#588157", "#7b5ea7"];

/// Every picture that there are figures for, with its file's name.
pub(super) fn all(report: &Report) -> Vec<(&'static str, String)> {
    let mut plots = Vec::new();
    if report.tables.iter().any(|table| !table.rows.is_empty()) {
        plots.push(("throughput.svg", bars(report)));
    }
    if let Some(timeline) = &report.timeline {
        plots.push(("guest-latency.svg", latency(timeline)));
    }
    if !report.curves.is_empty() {
        plots.push(("incremental-time.svg", curves(&report.curves)));
    }
    plots
}

fn svg(height: f64, title: &str, body: &str) -> String {
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' {FONT}>\n\
         <rect width='100%' height='100%' fill='white'/>\n\
         <text x='12' y='22' font-size='16' font-weight='bold'>{title}</text>\n{body}</svg>\n"
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// A bar a contender: MiB of data a second.
fn bars(report: &Report) -> String {
    let data = (report.data.size - report.data.holes) as f64;
    let tables: Vec<_> = report.tables.iter().filter(|table| !table.rows.is_empty()).collect();
    let rows = tables.iter().flat_map(|table| &table.rows);
    let most = rows.map(|row| data / row.median).fold(1.0, f64::max);
    let (mut body, mut y) = (String::new(), 52.0);
    for table in tables {
        let _ = writeln!(body, "<text x='12' y='{y}' font-weight='bold'>{}</text>", escape(&table.title));
        for (index, row) in table.rows.iter().enumerate() {
            y += 22.0;
            let rate = data / row.median;
            let ours = index == 0
                || row.name.starts_with("Stillpoint")
                || table.title.starts_with("Handing") && index < 3;
            let (width, colour) = (rate / most * (WIDTH - 320.0), if ours { OURS } else { OTHERS });
            let _ = writeln!(
                body,
                "<text x='210' y='{y}' text-anchor='end'>{}</text>\
                 <rect x='220' y='{}' width='{width:.1}' height='16' fill='{colour}'/>\
                 <text x='{:.1}' y='{y}'>{rate:.0} MiB/s</text>",
                escape(&row.name),
                y - 12.0,
                226.0 + width
            );
        }
        y += 36.0;
    }
    svg(y, "Throughput, data of the disk a second", &body)
}

const LEFT: f64 = 62.0;
const TOP: f64 = 44.0;
const HEIGHT: f64 = 360.0;
const BOTTOM: f64 = 50.0;

/// A logarithmic axis.
struct Log {
    low: f64,
    high: f64,
}

impl Log {
    fn around(values: impl Iterator<Item = f64> + Clone) -> Self {
        let positive = values.filter(|value| *value > 0.0);
        let low = positive.clone().fold(f64::INFINITY, f64::min).min(1e9);
        let high = positive.fold(low, f64::max);
        Self { low: 10f64.powf(low.log10().floor()), high: 10f64.powf((high * 1.01).log10().ceil()) }
    }

    /// 0 to 1.
    fn at(&self, value: f64) -> f64 {
        (value.max(self.low).log10() - self.low.log10()) / (self.high.log10() - self.low.log10()).max(0.1)
    }

    fn decades(&self) -> Vec<f64> {
        let (low, high) = (self.low.log10().round(), self.high.log10().round());
        std::iter::successors(Some(low), |power| Some(power + 1.0))
            .take_while(|power| *power <= high)
            .map(|power| 10f64.powf(power))
            .collect()
    }
}

fn y_axis(body: &mut String, axis: &Log, label: &str) {
    for value in axis.decades() {
        let y = HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - BOTTOM - TOP);
        let _ = writeln!(
            body,
            "<line x1='{LEFT}' x2='{}' y1='{y:.1}' y2='{y:.1}' stroke='#e4e4e4'/><text x='{}' y='{:.1}' text-anchor='end'>{value}</text>",
            WIDTH - 14.0,
            LEFT - 6.0,
            y + 4.0
        );
    }
    let _ = writeln!(
        body,
        "<text transform='translate(16 {:.1}) rotate(-90)' text-anchor='middle'>{label}</text>",
        f64::midpoint(HEIGHT - BOTTOM, TOP)
    );
}

fn line(body: &mut String, points: impl Iterator<Item = (f64, f64)>, colour: &str, width: f64) {
    let points: Vec<_> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        body,
        "<polyline points='{}' fill='none' stroke='{colour}' stroke-width='{width}'/>",
        points.join(" ")
    );
}

fn legend(body: &mut String, entries: &[(&str, &str)]) {
    let mut x = WIDTH - 14.0 - 96.0 * entries.len() as f64;
    for (name, colour) in entries {
        let _ = writeln!(
            body,
            "<rect x='{x}' y='12' width='12' height='12' fill='{colour}'/><text x='{}' y='23'>{}</text>",
            x + 17.0,
            escape(name)
        );
        x += 96.0;
    }
}

fn latency(timeline: &Timeline) -> String {
    let end = timeline.points.iter().map(|point| point.0).fold(1.0, f64::max);
    let x = |second: f64| LEFT + second / end * (WIDTH - LEFT - 14.0);
    let axis = Log::around(timeline.points.iter().flat_map(|point| [point.1, point.3]));
    let mut body = String::new();
    let mut labels = String::new();
    for (index, (name, from, to)) in timeline.backups.iter().enumerate() {
        let fill = if name == "full" { "#fbeecb" } else { "#d9ead3" };
        let _ = writeln!(
            body,
            "<rect x='{:.1}' y='{TOP}' width='{:.1}' height='{}' fill='{fill}'/>",
            x(*from),
            (x(*to) - x(*from)).max(1.0),
            HEIGHT - BOTTOM - TOP,
        );
        // The others are told by their colour.
        if !timeline.backups.iter().take(index).any(|(before, ..)| before == name) {
            let (x, y) = (x(*from) + 3.0, TOP + 14.0);
            let _ = writeln!(labels, "<text x='{x:.1}' y='{y}' fill='#555'>{name}</text>");
        }
    }
    body += &labels;
    y_axis(&mut body, &axis, "ms");
    let y = |value: f64| HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - BOTTOM - TOP);
    // Broad, to be seen where the 99th percentile of a few writes is the longest of them.
    line(&mut body, timeline.points.iter().map(|point| (x(point.0), y(point.3))), OTHERS, 4.0);
    line(&mut body, timeline.points.iter().map(|point| (x(point.0), y(point.2))), COLOURS[1], 1.4);
    line(&mut body, timeline.points.iter().map(|point| (x(point.0), y(point.1))), OURS, 1.6);
    let step = if end > 60.0 { 10.0 } else { 5.0 };
    let mut second = 0.0;
    while second <= end {
        let _ = writeln!(
            body,
            "<text x='{:.1}' y='{}' text-anchor='middle'>{second}</text>",
            x(second),
            HEIGHT - BOTTOM + 18.0
        );
        second += step;
    }
    let _ =
        writeln!(body, "<text x='{}' y='{}' text-anchor='middle'>seconds</text>", WIDTH / 2.0, HEIGHT - 10.0);
    legend(&mut body, &[("median", OURS), ("p99", COLOURS[1]), ("longest", OTHERS)]);
    svg(HEIGHT, "The guest's writes under a steady load", &body)
}

fn curves(curves: &[Curve]) -> String {
    let sizes = curves.iter().flat_map(|curve| &curve.points).map(|point| point.0);
    let (low, high) = (sizes.clone().fold(f64::INFINITY, f64::min), sizes.fold(1.0, f64::max));
    let x =
        |size: f64| LEFT + 16.0 + (size / low).log2() / (high / low).log2().max(1.0) * (WIDTH - LEFT - 60.0);
    let axis = Log::around(curves.iter().flat_map(|curve| &curve.points).map(|point| point.1));
    let mut body = String::new();
    y_axis(&mut body, &axis, "seconds");
    let y = |value: f64| HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - BOTTOM - TOP);
    let mut names = Vec::new();
    for (curve, colour) in curves.iter().zip(COLOURS) {
        line(&mut body, curve.points.iter().map(|point| (x(point.0), y(point.1))), colour, 2.0);
        for (size, seconds) in &curve.points {
            let _ = writeln!(
                body,
                "<circle cx='{:.1}' cy='{:.1}' r='3.5' fill='{colour}'/>",
                x(*size),
                y(*seconds)
            );
        }
        names.push((curve.name.as_str(), colour));
    }
    for (size, _) in curves.first().map(|curve| curve.points.as_slice()).unwrap_or_default() {
        let _ = writeln!(
            body,
            "<text x='{:.1}' y='{}' text-anchor='middle'>{size}</text>",
            x(*size),
            HEIGHT - BOTTOM + 18.0
        );
    }
    let axis = curves.first().map_or("", |curve| curve.axis);
    let _ =
        writeln!(body, "<text x='{}' y='{}' text-anchor='middle'>{axis}</text>", WIDTH / 2.0, HEIGHT - 10.0);
    legend(&mut body, &names);
    svg(HEIGHT, "Incremental backup of 256 MiB that changed", &body)
}
