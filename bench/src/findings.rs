//! What the numbers say: tables and verdicts of each section, made of its samples alone. Pure.

use super::index::finding as index;
use super::results::Samples;
use super::stats::{Spread, number};
use super::tables::{Bound, Finding, Table, Verdict};

const OURS: &str = "audit-log-sweeper";
const UNBOUNDED: &str = "one unbounded UPDATE";
const ORIGINAL: &str = "the original's statement in a loop";
const PROCEDURE: &str = "a PL/pgSQL loop, as for pg_cron";
const RATE: &str = "rows/seconds";

/// Of a section by its key in the file.
pub fn of(section: &str, samples: &Samples) -> Finding {
    match section.split_once(' ').map_or(section, |(_, name)| name) {
        "drain" => drain(samples),
        "statistics" => statistics(samples),
        "snapshot" => snapshot(samples),
        "trips" => trips(samples),
        "idle" => idle(samples),
        "foreground" => foreground(samples),
        "memory" => memory(samples),
        "controller" => controller(samples),
        "index" => index(samples),
        _ => Finding::default(),
    }
}

pub fn shown(spread: Option<Spread>) -> String {
    spread.map_or_else(|| "-".into(), |spread| spread.to_string())
}

fn middle(spread: Option<Spread>) -> Option<f64> {
    spread.map(|spread| spread.median)
}

fn drain(samples: &Samples) -> Finding {
    let mut finding = Finding::default();
    for case in samples.cases() {
        let title = format!("Drain, {case}: median (least..most)");
        let mut table = Table::new(title, &["", "rows/s", "of the unbounded one", "of the original"]);
        for subject in samples.subjects(case) {
            let ratio = |against| shown(samples.ratio((case, subject), (case, against), RATE));
            let rate = shown(samples.spread(case, subject, RATE));
            table.row([subject.into(), rate, ratio(UNBOUNDED), ratio(ORIGINAL)]);
        }
        finding.tables.push(table);
        let ratio = |against| middle(samples.ratio((case, OURS), (case, against), RATE));
        let least = if case == "one block" { 0.72 } else { 0.8 };
        let limit =
            Verdict::must(format!("drain, {case}: of the unbounded UPDATE"), ratio(UNBOUNDED), Bound::AtLeast(least));
        finding.verdicts.push(limit.aiming(Bound::AtLeast(0.85)));
        let original = Verdict::must(format!("drain, {case}: of the original"), ratio(ORIGINAL), Bound::AtLeast(1.05));
        finding.verdicts.push(original.aiming(Bound::AtLeast(1.15)));
        let what = format!("drain, {case}: of the PL/pgSQL loop");
        finding.verdicts.push(Verdict::must(what, ratio(PROCEDURE), Bound::AtLeast(1.0)));
    }
    finding
}

fn statistics(samples: &Samples) -> Finding {
    let mut table = Table::new("Drain by what the planner knows", &["statistics", "rows/s"]);
    let mut medians = vec![];
    for case in samples.cases() {
        let spread = samples.spread(case, OURS, RATE);
        medians.extend(middle(spread));
        table.row([case.into(), shown(spread)]);
    }
    let apart = Spread::of(&medians).filter(|_| medians.len() == 3).map(|spread| spread.max / spread.min);
    let verdict = Verdict::must("statistics: the best of the worst", apart, Bound::AtMost(1.5));
    Finding { tables: vec![table], verdicts: vec![verdict] }
}

fn snapshot(samples: &Samples) -> Finding {
    let mut finding = Finding::default();
    for case in samples.cases() {
        let title = format!("Drain beside an old snapshot, {case}");
        let mut table = Table::new(title, &["", "rows/s", "of the original"]);
        for subject in samples.subjects(case) {
            let ratio = samples.ratio((case, subject), (case, ORIGINAL), RATE);
            table.row([subject.into(), shown(samples.spread(case, subject, RATE)), shown(ratio)]);
        }
        finding.tables.push(table);
        let ratio = middle(samples.ratio((case, OURS), (case, ORIGINAL), RATE));
        let what = format!("beside an old snapshot, {case}: of the original");
        let least = if case == "one block" { 1.8 } else { 3.0 };
        finding.verdicts.push(Verdict::must(what, ratio, Bound::AtLeast(least)));
    }
    finding
}

fn trips(samples: &Samples) -> Finding {
    let case = "2 ms away";
    let columns = ["", "seconds", "batches", "round trips", "of them without work", "a batch"];
    let mut table = Table::new("Drain with 2 ms added to each round trip", &columns);
    // An idle sweep has one batch, whose trips are among those without work.
    let each = |subject| {
        let value = |name| middle(samples.spread(case, subject, name));
        Some((value("trips")? - value("trips when idle")?) / (value("batches")? - 1.0))
    };
    for subject in samples.subjects(case) {
        let value = |name| shown(samples.spread(case, subject, name));
        let each = each(subject).map_or_else(|| "-".into(), number);
        table.row([subject.into(), value("seconds"), value("batches"), value("trips"), value("trips when idle"), each]);
    }
    let verdict = Verdict::must("round trips a batch", each(OURS), Bound::AtMost(2.0));
    Finding { tables: vec![table], verdicts: vec![verdict] }
}

fn idle(samples: &Samples) -> Finding {
    let columns = ["", "buffers", "batch, ms", "backlog, ms", "server, ms", "whole program, ms"];
    let mut table = Table::new("A sweep that finds nothing", &columns);
    for case in samples.cases() {
        let value = |name| shown(samples.spread(case, OURS, name));
        let cells = ["buffers", "batch ms", "backlog ms", "server ms", "whole ms"].map(value);
        table.row([case.to_owned()].into_iter().chain(cells));
    }
    let sizes: Vec<&str> = samples.cases().into_iter().filter(|case| case.ends_with(" rows, vacuumed")).collect();
    let over = |name: &str| {
        let all: Vec<f64> = sizes.iter().filter_map(|case| middle(samples.spread(case, OURS, name))).collect();
        Spread::of(&all)
    };
    // By size, from the smallest table to the largest; a single size shows no growth.
    let grown = |name: &str| {
        let by_size =
            |case: &&&str| case.split(" rows").next().and_then(|text| text.replace(' ', "").parse::<u64>().ok());
        let (least, most) = (sizes.iter().min_by_key(by_size)?, sizes.iter().max_by_key(by_size)?);
        Some(middle(samples.spread(most, OURS, name))? / middle(samples.spread(least, OURS, name))?)
    };
    let verdicts = vec![
        Verdict::must(
            "idle, vacuumed: buffers, at most",
            over("buffers").map(|spread| spread.max),
            Bound::AtMost(10.0),
        ),
        Verdict::must("idle: server time, largest table to smallest", grown("server ms"), Bound::AtMost(1.5)),
        Verdict::must("idle: whole time, largest table to smallest", grown("whole ms"), Bound::AtMost(1.5)),
    ];
    Finding { tables: vec![table], verdicts }
}

fn foreground(samples: &Samples) -> Finding {
    let (case, nobody) = ("requests", "without a sweep");
    let names = ["start p50", "start p99", "complete p50", "complete p99"];
    let mut table = Table::new(
        "Requests while a backlog is drained, ms; in brackets against those without a sweep",
        &["", "requests/s", "drain, s", "start p50", "start p99", "complete p50", "complete p99"],
    );
    let mut verdicts = vec![];
    for subject in samples.subjects(case) {
        let value = |name| middle(samples.spread(case, subject, name)).map_or_else(|| "-".into(), number);
        // Of medians: a stall of the machine in one round without a sweep would pass for a gain.
        let ratio = |name| {
            let [with, without] = [subject, nobody].map(|subject| middle(samples.spread(case, subject, name)));
            Some(with? / without?)
        };
        let cells = names.map(|name| match ratio(name) {
            Some(ratio) if name.ends_with("p99") => {
                format!("{} [{}]", shown(samples.spread(case, subject, name)), number(ratio))
            }
            _ => value(name),
        });
        let seconds = if subject == nobody { "-".into() } else { value("seconds") };
        table.row([subject.into(), value("rate"), seconds].into_iter().chain(cells));
        if subject == OURS {
            for name in ["start p99", "complete p99"] {
                let what = format!("foreground: {name} against no sweep");
                verdicts.push(Verdict::aim(what, ratio(name), Bound::AtMost(1.2)));
            }
        }
    }
    Finding { tables: vec![table], verdicts }
}

fn memory(samples: &Samples) -> Finding {
    let mut table = Table::new("Resident memory of the program while it drains", &["after, s", "MB"]);
    let (seconds, megabytes) = (samples.rounds("drain", OURS, "seconds"), samples.rounds("drain", OURS, "megabytes"));
    for (round, seconds) in &seconds {
        // Every other one tells enough.
        if round % 2 == 0 {
            table.row([number(*seconds), number(megabytes[round])]);
        }
    }
    let most = |part: &[f64]| {
        part.iter().copied().fold(None, |most: Option<f64>, one| Some(most.map_or(one, |most| most.max(one))))
    };
    let all: Vec<f64> = megabytes.into_values().collect();
    // The first quarter connects and fills its buffers.
    let quarter = all.len() / 4;
    let growth =
        most(&all[all.len() - quarter..]).zip(most(&all[quarter..2 * quarter])).map(|(last, second)| last / second);
    let verdict = Verdict::must("memory: last quarter of the drain to the second", growth, Bound::AtMost(1.1));
    Finding { tables: vec![table], verdicts: vec![verdict] }
}

fn controller(samples: &Samples) -> Finding {
    let mut table = Table::new("The operator", &["", "measured"]);
    let value = |case: &str, name: &str| middle(samples.spread(case, OURS, name));
    for case in samples.cases() {
        let all = samples.0.iter().filter(|sample| sample.case == case);
        for (name, value) in all.flat_map(|sample| &sample.values) {
            table.row([format!("{case}: {name}"), number(*value)]);
        }
    }
    let verdicts = vec![
        Verdict::aim("memory with one object, MB", value("one object", "resident MB"), Bound::AtMost(20.0)),
        Verdict::aim("memory with all objects, MB", value("steady", "resident MB"), Bound::AtMost(150.0)),
        Verdict::aim(
            "memory as all objects are new, MB",
            value("first start", "most resident MB"),
            Bound::AtMost(150.0),
        ),
        Verdict::must("status writes for each sweep", value("in all", "status writes/sweeps"), Bound::Exactly(1.0)),
        Verdict::aim("lag p99, s", value("steady", "lag p99 s"), Bound::AtMost(1.0)),
        Verdict::must(
            "sweeps at once on one server after a restart",
            value("restart", "sweeps at once"),
            Bound::AtMost(3.0),
        ),
    ];
    Finding { tables: vec![table], verdicts }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Sample;

    fn words(finding: &Finding) -> Vec<&'static str> {
        finding.verdicts.iter().map(Verdict::word).collect()
    }

    /// One block drained at these rates, by the round.
    fn drained(ours: &[f64], unbounded: &[f64], original: &[f64]) -> Finding {
        let mut samples = Samples::default();
        for (subject, rates) in [(OURS, ours), (UNBOUNDED, unbounded), (ORIGINAL, original), (PROCEDURE, original)] {
            for (round, rate) in (0..).zip(rates) {
                samples.push(Sample::new("one block", subject, round, [("rows", *rate), ("seconds", 1.0)]));
            }
        }
        of("1 drain", &samples)
    }

    #[test]
    fn a_drain_is_held_against_the_others_by_the_median_round() {
        assert_eq!(words(&drained(&[75.0, 90.0, 1.0], &[100.0; 3], &[70.0; 3])), ["missed", "missed", "PASS"]);
        assert_eq!(words(&drained(&[71.0, 90.0, 1.0], &[100.0; 3], &[75.0; 3])), ["FAIL", "FAIL", "FAIL"]);
        assert_eq!(words(&drained(&[85.0; 3], &[100.0; 3], &[60.0; 3])), ["PASS", "PASS", "PASS"]);
        // Without the others there is no verdict to be had.
        assert_eq!(words(&drained(&[85.0; 3], &[100.0; 3], &[])), ["PASS", "FAIL", "FAIL"]);
    }

    #[test]
    fn statistics_need_all_three_states() {
        let found = |rates: &[f64]| {
            let mut samples = Samples::default();
            for (rate, case) in rates.iter().zip(["from before the backlog", "fresh", "never analyzed"]) {
                samples.push(Sample::new(case, OURS, 0, [("rows", *rate), ("seconds", 1.0)]));
            }
            words(&of("2 statistics", &samples))
        };
        assert_eq!(found(&[10.0, 15.0, 12.0]), ["PASS"]);
        assert_eq!(found(&[10.0, 15.1, 12.0]), ["FAIL"]);
        assert_eq!(found(&[10.0, 10.0]), ["FAIL"]);
    }

    #[test]
    fn round_trips_are_those_beyond_an_idle_sweep() {
        let found = |trips: f64| {
            let values = [("seconds", 1.0), ("batches", 11.0), ("trips", trips), ("trips when idle", 8.0)];
            let samples = Samples(vec![Sample::new("2 ms away", OURS, 0, values)]);
            of("4 trips", &samples).verdicts[0].clone()
        };
        assert_eq!((found(28.0).value, found(28.0).word()), (Some(2.0), "PASS"));
        assert_eq!(found(29.0).word(), "FAIL");
    }

    #[test]
    fn an_idle_sweep_must_stay_small_and_not_grow() {
        let found = |large: [f64; 3]| {
            let mut samples = Samples::default();
            for (case, [buffers, server, whole]) in
                [("10 000 000 rows, vacuumed", large), ("100 000 rows, vacuumed", [4.0, 1.0, 10.0])]
            {
                let values = [("buffers", buffers), ("server ms", server), ("whole ms", whole)];
                samples.push(Sample::new(case, OURS, 0, values));
            }
            // What was not vacuumed is told, and not held against anything.
            samples.push(Sample::new("5 completed, not vacuumed: first", OURS, 0, [("buffers", 9000.0)]));
            words(&of("5 idle", &samples))
        };
        assert_eq!(found([10.0, 1.5, 15.0]), ["PASS"; 3]);
        assert_eq!(found([11.0, 1.6, 16.0]), ["FAIL"; 3]);
    }

    #[test]
    fn memory_must_be_flat_after_the_first_quarter() {
        let found = |megabytes: [f64; 8]| {
            let sample =
                |(round, mb)| Sample::new("drain", OURS, round, [("seconds", f64::from(round)), ("megabytes", mb)]);
            words(&of("7 memory", &Samples((0..).zip(megabytes).map(sample).collect())))
        };
        assert_eq!(found([5.0, 8.0, 9.0, 10.0, 10.0, 10.0, 10.0, 11.0]), ["PASS"]);
        assert_eq!(found([5.0, 8.0, 9.0, 10.0, 10.0, 10.0, 10.0, 11.1]), ["FAIL"]);
    }

    #[test]
    fn requests_are_held_against_those_without_a_sweep() {
        let found = |p99: f64| {
            let mut samples = Samples::default();
            for (subject, p99) in [("without a sweep", 10.0), (OURS, p99)] {
                samples.push(Sample::new("requests", subject, 0, [("start p99", p99), ("complete p99", 10.0)]));
            }
            words(&of("6 foreground", &samples))
        };
        assert_eq!(found(12.0), ["PASS", "PASS"]);
        assert_eq!(found(12.1), ["missed", "PASS"]);
    }

    #[test]
    fn every_sweep_is_one_status_write() {
        let found = |writes: f64, at_once: f64| {
            let samples = Samples(vec![
                Sample::new("in all", OURS, 0, [("status writes", writes), ("sweeps", 200.0)]),
                Sample::new("restart", OURS, 0, [("sweeps at once", at_once)]),
            ]);
            let words = words(&of("controller", &samples));
            [words[3], words[5]]
        };
        assert_eq!(found(200.0, 3.0), ["PASS", "PASS"]);
        assert_eq!(found(201.0, 4.0), ["FAIL", "FAIL"]);
    }
}
