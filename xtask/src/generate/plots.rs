//! The plots that lead docs/performance.md: bars, as SVG that reads well on light and dark pages. Pure but for reading results.

use anyhow::Context;
use bench::results::{self, Results, Samples};
use std::fmt::Write;
use support::build::root;

/// What a plot shows.
struct Plot {
    /// Where it is written.
    file: &'static str,
    /// Where its numbers are.
    results: &'static str,
    section: &'static str,
    value: &'static str,
    title: &'static str,
    /// The subject that stands out.
    ours: &'static str,
}

/// The version that is plotted. The tables have the others.
const SERVER: &str = "PostgreSQL 15";

const PLOTS: [Plot; 2] = [
    Plot {
        file: "docs/performance/drain.svg",
        results: "docs/performance/sweep.json",
        section: "1 drain",
        value: "rows/seconds",
        title: "Rows completed per second, on PostgreSQL 15: more is better",
        ours: "audit-log-sweeper",
    },
    Plot {
        file: "docs/performance/index.svg",
        results: "docs/performance/index.json",
        section: "index",
        value: "rate 3",
        title: "The application's requests per second beside each index, on PostgreSQL 15: more is better",
        ours: "private",
    },
];

const WIDTH: f64 = 760.0;
const LABELS: f64 = 260.0;
const ROW: f64 = 22.0;

const STYLE: &str = "<style>
text { font: 13px sans-serif; fill: #1f2328 } .head { font-weight: bold } rect { fill: #8c959f } .ours { fill: #1f6feb }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #6e7681 } .ours { fill: #58a6ff } }
</style>
";

/// Each file and its content.
pub fn files() -> anyhow::Result<Vec<(&'static str, String)>> {
    let measured = PLOTS.iter().filter(|plot| root().join(plot.results).exists());
    measured.map(|plot| Ok((plot.file, svg(plot, &results::read(&root().join(plot.results))?)?))).collect()
}

fn svg(plot: &Plot, results: &Results) -> anyhow::Result<String> {
    let part = results.servers.get(SERVER).and_then(|parts| parts.get(plot.section));
    let samples = &part.with_context(|| format!("{} lacks {:?} of {SERVER}", plot.results, plot.section))?.samples;
    let bars = bars(plot, samples);
    let most = bars.iter().filter_map(|(_, value)| *value).fold(0.0, f64::max);
    let height = (bars.len() as f64 + 2.0) * ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{title}</title>\n{STYLE}<text class=\"head\" x=\"8\" y=\"16\">{title}</text>\n",
        title = plot.title
    );
    for (row, (label, value)) in bars.iter().enumerate() {
        let top = (row as f64 + 1.5) * ROW;
        let base = top + 14.0;
        let Some(value) = value else {
            writeln!(svg, "<text class=\"head\" x=\"8\" y=\"{base}\">{label}</text>")?;
            continue;
        };
        let width = (value / most * (WIDTH - LABELS - 80.0)).round();
        let class = if label == plot.ours { " class=\"ours\"" } else { "" };
        writeln!(svg, "<text x=\"20\" y=\"{base}\">{label}</text>")?;
        writeln!(svg, "<rect{class} x=\"{LABELS}\" y=\"{top}\" width=\"{width}\" height=\"16\"/>")?;
        writeln!(svg, "<text x=\"{}\" y=\"{base}\">{value:.0}</text>", LABELS + width + 6.0)?;
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// A line for each case, without a value, and below it one for each of its subjects.
fn bars(plot: &Plot, samples: &Samples) -> Vec<(String, Option<f64>)> {
    let mut bars = vec![];
    for case in samples.cases() {
        bars.push((case.to_owned(), None));
        let median = |subject| samples.spread(case, subject, plot.value).map(|spread| spread.median);
        bars.extend(samples.subjects(case).into_iter().map(|subject| (subject.to_owned(), median(subject))));
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;
    use bench::results::{Part, Sample};
    use std::collections::BTreeMap;

    #[test]
    fn the_longest_bar_is_the_largest_median_and_ours_stands_out() {
        let mut samples = Samples::default();
        for (subject, rows) in [("audit-log-sweeper", 50.0), ("another", 100.0)] {
            samples.push(Sample::new("one block", subject, 0, [("rows", rows), ("seconds", 1.0)]));
        }
        let part = Part { options: serde_json::json!({}), seconds: 1.0, samples };
        let servers = BTreeMap::from([(SERVER.to_owned(), BTreeMap::from([("1 drain".to_owned(), part)]))]);
        let svg = svg(&PLOTS[0], &Results { machine: BTreeMap::new(), servers }).unwrap();
        assert!(svg.contains("<rect class=\"ours\" x=\"260\" y=\"55\" width=\"210\""), "{svg}");
        assert!(svg.contains("<rect x=\"260\" y=\"77\" width=\"420\""), "{svg}");
    }
}
