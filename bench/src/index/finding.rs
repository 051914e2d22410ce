//! The table of what the sweep's index costs the application, made of its samples alone. Pure.

use super::Subject;
use crate::findings::shown;
use crate::results::Samples;
use crate::tables::{Finding, Table};

/// The last interval has felt most of what earlier requests left in the index.
const RATE: &str = "rate 3";
const COMPLETE: &str = "complete p99 3";

const TITLE: &str =
    "Requests per second in the third interval, their ratio to those without an index, and p99 of a completion, ms";

/// One row for each situation.
pub fn finding(samples: &Samples) -> Finding {
    let columns = [
        "",
        "no index",
        "plain",
        "private",
        "plain / no index",
        "private / no index",
        "p99, no index",
        "p99, plain",
        "p99, private",
    ];
    let mut table = Table::new(TITLE, &columns);
    for case in samples.cases() {
        let value = |name| Subject::ALL.map(|subject| shown(samples.spread(case, subject.name(), name)));
        let against = (case, Subject::Without.name());
        let ratios = [Subject::Plain, Subject::Private]
            .map(|subject| shown(samples.ratio((case, subject.name()), against, RATE)));
        table.row([case.to_owned()].into_iter().chain(value(RATE)).chain(ratios).chain(value(COMPLETE)));
    }
    Finding { tables: vec![table], verdicts: vec![] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Sample;

    const CASE: &str = "healthy, autovacuum off";

    fn sample(subject: Subject, round: u32, rate: f64, p99: f64) -> Sample {
        Sample::new(CASE, subject.name(), round, [("rate 1", 9.0), (RATE, rate), (COMPLETE, p99)])
    }

    fn row(samples: Vec<Sample>) -> Vec<String> {
        finding(&Samples(samples)).tables[0].rows[0].clone()
    }

    #[test]
    fn the_third_interval_is_held_against_the_same_without_an_index() {
        let samples = vec![
            sample(Subject::Private, 0, 3900.0, 1.5),
            sample(Subject::Without, 0, 4000.0, 1.5),
            sample(Subject::Plain, 0, 100.0, 60.0),
        ];
        assert_eq!(row(samples), [CASE, "4 000", "100", "3 900", "0.025", "0.975", "1.50", "60", "1.50"]);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let samples = vec![
            sample(Subject::Without, 0, 4000.0, 1.0),
            sample(Subject::Private, 0, 4000.0, 1.0),
            // A slow machine slows both.
            sample(Subject::Private, 1, 2000.0, 1.0),
            sample(Subject::Without, 1, 2000.0, 1.0),
        ];
        let row = row(samples);
        assert_eq!(row[5], "1");
        assert_eq!(row[3], "3 000 (2 000..4 000)");
        // A subject that did not run has no number.
        assert_eq!([&row[2], &row[4], &row[7]], ["-", "-", "-"]);
    }
}
