//! The run as a picture: answers a second and the latency of publishing over
//! time, with the moments of the outage. Text only; whoever asks writes the file.

use std::fmt::Write;

use super::timeline::{Bucket, Moments};

/// Draws the plot.
pub(super) fn draw(title: &str, buckets: &[Bucket], moments: &Moments) -> String {
    let seconds = moments.end.as_secs_f64().max(0.1);
    let x = |s: f64| LEFT + s / seconds * WIDTH;
    let mut out = String::new();
    out.push_str(&format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 900 560\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n<rect width=\"900\" height=\"560\" fill=\"#fff\"/>\n<text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>\n",
        escape(title)
    ));
    // The time without a broker, behind everything else.
    let (from, to) = (
        x(moments.struck.as_secs_f64()),
        x(moments.probed.as_secs_f64()),
    );
    for top in [TOP, BELOW] {
        put(
            &mut out,
            format_args!(
                "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"#fbe3e0\"/>\n",
                (to - from).max(0.0)
            ),
        );
    }
    let most = buckets.iter().map(|b| b.rate).fold(1.0, f64::max);
    let most = step(most / 4.0) * 4.0;
    let rate = |r: f64| TOP + HEIGHT - r / most * HEIGHT;
    for n in 0..=4 {
        let value = most * f64::from(n) / 4.0;
        grid(&mut out, rate(value), &format!("{value:.0}"));
    }
    let longest = buckets
        .iter()
        .filter_map(|b| b.p99_us)
        .fold(1000.0, f64::max);
    // Decades, from a hundredth of a millisecond.
    let decades = (longest / LEAST_US).log10().ceil().max(1.0);
    let latency = |us: f64| {
        let share = (us.max(LEAST_US) / LEAST_US).log10() / decades;
        BELOW + HEIGHT - share * HEIGHT
    };
    let mut us = LEAST_US;
    while us <= LEAST_US * 10_f64.powf(decades) * 1.001 {
        grid(&mut out, latency(us), &format!("{}", us / 1000.0));
        us *= 10.0;
    }
    let tick = step(seconds / 8.0).max(1.0);
    let mut at = 0.0;
    while at <= seconds {
        put(
            &mut out,
            format_args!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{at:.0}</text>\n",
                x(at),
                BELOW + HEIGHT + 16.0
            ),
        );
        at += tick;
    }
    labels(&mut out);
    for (moment, name, row) in [
        (moments.struck, "away", 0.0),
        (moments.mended, "given back", 1.0),
        (moments.probed, "bare client confirmed", 2.0),
        (moments.drained_first, "first drained", 3.0),
        (moments.empty, "spool empty", 4.0),
    ] {
        let at = x(moment.as_secs_f64());
        put(
            &mut out,
            format_args!(
                "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"#888\" stroke-dasharray=\"3 3\"/>\n<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#555\" font-size=\"11\">{name}</text>\n",
                BELOW + HEIGHT,
                at + 3.0,
                TOP + 12.0 + row * 13.0
            ),
        );
    }
    let middle = |b: &Bucket| x((b.at.as_secs_f64() + 0.05).min(seconds));
    let rates = buckets.iter().map(|b| (middle(b), rate(b.rate)));
    line(&mut out, rates, "#1f5fa8");
    let latencies = buckets
        .iter()
        .filter_map(|b| Some((middle(b), latency(b.p99_us?))));
    line(&mut out, latencies, "#b4511f");
    out.push_str("</svg>\n");
    out
}

fn labels(out: &mut String) {
    for (top, text) in [
        (TOP, "answered messages a second"),
        (BELOW, "p99 of a publish, in ms (logarithmic)"),
    ] {
        put(
            out,
            format_args!(
                "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"bold\">{text}</text>\n",
                top - 8.0
            ),
        );
    }
    put(
        out,
        format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">seconds since the load began</text>\n",
            LEFT + WIDTH / 2.0,
            BELOW + HEIGHT + 36.0
        ),
    );
}

/// A horizontal line with its value.
fn grid(out: &mut String, y: f64, label: &str) {
    put(
        out,
        format_args!(
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\n<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>\n",
            LEFT + WIDTH,
            LEFT - 6.0,
            y + 4.0
        ),
    );
}

fn line(out: &mut String, points: impl Iterator<Item = (f64, f64)>, colour: &str) {
    out.push_str("<polyline fill=\"none\" stroke-width=\"1.5\" stroke=\"");
    out.push_str(colour);
    out.push_str("\" points=\"");
    for (x, y) in points {
        put(out, format_args!("{x:.1},{y:.1} "));
    }
    out.push_str("\"/>\n");
}

/// The next of 1, 2, 5, 10, 20, ...
fn step(least: f64) -> f64 {
    let decade = 10_f64.powf(least.max(1e-9).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    let found = steps.iter().find(|s| **s * decade >= least * 0.999);
    found.unwrap_or(&10.0) * decade
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = out.write_fmt(text);
}

const LEFT: f64 = 70.0;
const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 190.0;
/// Where the upper and the lower panel begin.
const TOP: f64 = 60.0;
const BELOW: f64 = 305.0;
/// The lowest latency that is drawn, in microseconds.
const LEAST_US: f64 = 10.0;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn steps_are_round_numbers() {
        for (least, expected) in [(0.7, 1.0), (1.0, 1.0), (3.0, 5.0), (1250.0, 2000.0)] {
            assert!((step(least) - expected).abs() < 1e-6, "{least}");
        }
    }

    #[test]
    fn a_plot_has_its_axes_with_units_and_stays_inside() {
        let second = Duration::from_secs;
        let moments = Moments {
            struck: second(2),
            mended: second(4),
            probed: second(5),
            draining: second(5),
            drained_first: second(5),
            empty: second(6),
            end: second(8),
        };
        let buckets: Vec<Bucket> = (0..80)
            .map(|n| Bucket {
                at: Duration::from_millis(100) * n,
                rate: 5000.0,
                p99_us: (n % 2 == 0).then_some(f64::from(n) * 100.0),
            })
            .collect();
        let svg = draw("a < b", &buckets, &moments);
        for text in [
            "messages a second",
            "in ms",
            "seconds since",
            "a &lt; b",
            "spool empty",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        let points = svg.split("points=\"").skip(1);
        for pair in points.flat_map(|p| p.split('"').next().unwrap().split_whitespace()) {
            let (x, y) = pair.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((LEFT..=LEFT + WIDTH).contains(&x), "{x}");
            assert!((TOP..=BELOW + HEIGHT).contains(&y), "{y}");
        }
        assert_eq!(svg.matches('<').count(), svg.matches('>').count());
    }
}
