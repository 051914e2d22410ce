//! The exposition in Prometheus's older text format, for whoever does not ask for OpenMetrics: curl, promtool, and
//! scrapers that know nothing else. Pure.

use std::fmt::Write;

/// What `/metrics` answers with then.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// An exposition in OpenMetrics's text format, of families that are counters, gauges, histograms or infos, in the older
/// one: there a family bears the name of its samples, an info is a gauge, and the end is not marked.
pub fn plain(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len() + 256);
    // Its name depends on the type, which comes after it.
    let mut help = "";
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                _ => ("", kind),
            };
            // Writing to a String does not fail.
            let _ = write!(text, "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_named_after_their_samples_and_nothing_else_changes() {
        let openmetrics = "# HELP a_build The binary.\n# TYPE a_build info\na_build_info{version=\"1\"} 1\n\
                           # HELP a_rows Rows.\n# TYPE a_rows counter\na_rows_total{name=\"# TYPE x counter\"} 3\n\
                           # HELP a_ready Whether.\n# TYPE a_ready gauge\na_ready 0\n# EOF\n";
        let text = "# HELP a_build_info The binary.\n# TYPE a_build_info gauge\na_build_info{version=\"1\"} 1\n\
                    # HELP a_rows_total Rows.\n# TYPE a_rows_total counter\na_rows_total{name=\"# TYPE x counter\"} 3\n\
                    # HELP a_ready Whether.\n# TYPE a_ready gauge\na_ready 0\n";
        assert_eq!(plain(openmetrics), text);
        assert_eq!(plain("# EOF\n"), "");
    }
}
