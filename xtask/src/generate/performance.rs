//! The document with what was measured, made from the files of results that are kept in the repository.

use bench::findings;
use bench::results::{self, Results};
use bench::tables::verdicts;
use support::build::root;

pub const DOCUMENT: &str = "docs/performance.md";

/// What `cargo xtask bench ... --output` wrote, and what the document says of it. What was not measured is left out.
struct Chapter {
    file: &'static str,
    title: &'static str,
    about: &'static str,
    /// Measures it again.
    command: &'static str,
}

const CHAPTERS: [Chapter; 3] = [
    Chapter {
        file: "docs/performance/sweep.json",
        title: "The sweep",
        about: ABOUT_SWEEP,
        command: "\
$ cargo xtask bench sweep --afresh --output docs/performance/sweep.json             # half an hour each; without --afresh it goes on where it stopped
",
    },
    Chapter {
        file: "docs/performance/index.json",
        title: "The application's requests",
        about: ABOUT_INDEX,
        command: "\
$ cargo xtask bench index --afresh --output docs/performance/index.json             # seven minutes each
",
    },
    Chapter {
        file: "docs/performance/controller.json",
        title: "The operator",
        about: ABOUT_CONTROLLER,
        command: "\
$ cargo xtask bench controller --afresh --output docs/performance/controller.json   # twenty minutes
",
    },
];

const HEAD: &str = "\
# Performance

For those who ask what a sweep costs, and how it compares.

![Rows completed per second by each way](performance/drain.svg)

![Requests per second of the application beside each index](performance/index.svg)

What was measured, on one machine, in the same run as what stands against it. Made from
[`docs/performance`](performance) by `cargo xtask generate`; every single run is in those files. To measure again, on a
machine that does nothing else:

<!-- not run: it takes half an hour for each PostgreSQL -->
```console
";

const AFTER_COMMANDS: &str = "\
$ cargo xtask generate
```

Ours is the program `audit-log-sweeper` itself, from its start to its end, in the profile `bench-quick`: a release without
link-time optimization. Numbers are medians of the rounds, with the least and the most; ratios are taken within a round,
and each round begins with another subject. What is not in the tables below was not measured
yet. `FAIL` is outside of what was asked, `missed` outside of what was hoped for.
";

const ABOUT_SWEEP: &str = "\
The table is that of [`manifests/sql`](../manifests/sql), with its index. Every run has a fresh copy of the same files, after
a checkpoint, with 1 GB of shared buffers, fsync on and autovacuum off (but for the requests, where it is on and comes every
5 s). After each run every row is looked at: a row that was not stale and has a new version fails the benchmark. Unless said
otherwise the statistics are those from before the backlog, as after a crash.

The original is omicron's task ([comparison](compare.md)); its statement is `UPDATE ... WHERE id IN (SELECT id ... ORDER BY time_started, id LIMIT n)`, prepared. It may
overwrite a completion; the unbounded one also holds up every request for its rows. All of them state the predicate of the
private index, so each uses the same index.

Requests are made at half of what the server can do, and counted from when they were due, so that a stall is felt by all
that should have begun meanwhile. They and the server share the machine's cores.
The statistics are fresh, since a request that completes its row by `id` and `time_completed IS NULL` walks all open rows
with those from before the backlog: it takes many times as long, with and without a sweep. In that table `[...]` is the
median against the median without a sweep, since in other runs the machine stalled for some 0.3 s in one round or another.
Ours [gives way](sql-contract.md#what-a-sweep-does-to-the-server) nearly throughout, since a quarter of its time is longer
than the drain. So each request is held up much less, but some are for much longer. Of a backlog that outlasts that the
rest goes in ever larger batches, which requests feel as they feel other loops.
";

const ABOUT_INDEX: &str = "\
The application inserts a row and then completes it by `id` and `time_completed IS NULL`. Each statement is prepared and is a
transaction of its own. Each connection makes the next request as soon as the last one is done, for three successive
intervals. The table shows the third interval, and the file holds all three.

The plain index is `(time_started, id) WHERE time_completed IS NULL`. The private index is that of
[`index.sql`](../manifests/sql/index.sql). Every run has a fresh copy of the same complete rows, and ANALYZE runs when no row
is open. *Healthy* means that no row is stale. *Crash* means that stale rows are inserted after the ANALYZE, so the statistics
are from before the backlog. No sweep runs. Autovacuum is switched for the table, and its naptime is 5 s.

The application and the server share the machine's cores. The server's settings are those of the sweep's tables.
";

const ABOUT_CONTROLLER: &str = "\
One run: 10,000 objects with a period of 10 minutes ask for 16.7 sweeps a second, which is what `steady` shows. At the first
start a new object gets its first status, is then checked, and is swept at its slot. Before the restart every object was
due, and a new process checks each table, in a session of its own, before it sweeps it; so `sustained` is the most that
this machine does of both, three at once on one server. What is `in all` is from the restart on.

The objects share the databases of one server, and nothing is to be swept; the operator, the API server, etcd and PostgreSQL
share the machine, and etcd does not wait for its disk. For comparison, tried once by hand: one run of a CronJob with psql made a Job, a Pod and 8 events, and took 3 s on a real node, never more often than once a minute.
";

/// The document. None: nothing is kept.
pub fn document() -> anyhow::Result<Option<String>> {
    let measured: Vec<&Chapter> = CHAPTERS.iter().filter(|chapter| root().join(chapter.file).exists()).collect();
    if measured.is_empty() {
        return Ok(None);
    }
    let mut text = head(&measured);
    for Chapter { file, title, about, .. } in measured {
        text.push_str(&chapter(title, about, &results::read(&root().join(file))?));
    }
    Ok(Some(text))
}

fn head(measured: &[&Chapter]) -> String {
    let commands: String = measured.iter().map(|chapter| chapter.command).collect();
    format!("{HEAD}{commands}{AFTER_COMMANDS}")
}

fn chapter(title: &str, about: &str, results: &Results) -> String {
    let mut text = format!("\n## {title}\n\n{about}\n");
    for (what, value) in &results.machine {
        text.push_str(&format!("- {what}: {value}\n"));
    }
    for (server, parts) in &results.servers {
        text.push_str(&format!("\n### {title}: {server}\n"));
        let findings: Vec<_> = parts.iter().map(|(section, part)| findings::of(section, &part.samples)).collect();
        let all: Vec<_> = findings.iter().flat_map(|finding| finding.verdicts.clone()).collect();
        let tables = findings.iter().flat_map(|finding| &finding.tables);
        let verdicts = (!all.is_empty()).then(|| verdicts(&all));
        for table in verdicts.iter().chain(tables) {
            text.push_str(&format!("\n{}", table.markdown()));
        }
        let options: Vec<String> =
            parts.iter().map(|(section, part)| format!("{section}: `{}`", part.options)).collect();
        text.push_str(&format!("\nOptions: {}.\n", options.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use bench::results::{Part, Sample, Samples};
    use std::collections::BTreeMap;

    #[test]
    fn a_chapter_names_the_machine_and_has_a_verdict_for_each_claim() {
        let samples = Samples(vec![Sample::new("fresh", "audit-log-sweeper", 0, [("rows", 9.0), ("seconds", 1.0)])]);
        let part = Part { options: serde_json::json!({ "rows": 9 }), seconds: 1.0, samples };
        let machine = BTreeMap::from([("cpu".to_owned(), "fast, 2 cores".to_owned())]);
        let servers =
            BTreeMap::from([("PostgreSQL 15".to_owned(), BTreeMap::from([("2 statistics".to_owned(), part)]))]);
        let text = chapter("The sweep", "About.", &Results { machine, servers });
        for line in [
            "- cpu: fast, 2 cores",
            "### The sweep: PostgreSQL 15",
            "| fresh | 9 |",
            "Options: 2 statistics: `{\"rows\":9}`.",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(text.contains("| statistics: the best of the worst | - | at most 1.5 | | FAIL |"), "{text}");
    }

    #[test]
    fn the_head_has_the_commands_of_what_was_measured() {
        let head =
            |files: &[&str]| head(&CHAPTERS.iter().filter(|chapter| files.contains(&chapter.file)).collect::<Vec<_>>());
        let found = head(&["docs/performance/sweep.json", "docs/performance/controller.json"]);
        let commands: Vec<&str> = found.lines().filter(|line| line.starts_with("$ cargo xtask")).collect();
        assert!(commands[0].contains("bench sweep --afresh --output docs/performance/sweep.json"), "{found}");
        assert!(commands[1].contains("bench controller --afresh --output docs/performance/controller.json"), "{found}");
        assert_eq!(commands[2..], ["$ cargo xtask generate"]);
        assert!(head(&["docs/performance/index.json"]).contains("bench index --afresh"));
    }

    #[test]
    fn a_chapter_without_a_claim_has_no_table_of_verdicts() {
        let values = [("rate 3", 4000.0), ("complete p99 3", 1.5)];
        let samples = Samples(vec![Sample::new("healthy, autovacuum off", "no index", 0, values)]);
        let part = Part { options: serde_json::json!({ "rows": 9 }), seconds: 1.0, samples };
        let servers = BTreeMap::from([("PostgreSQL 15".to_owned(), BTreeMap::from([("index".to_owned(), part)]))]);
        let text = chapter("The application's requests", "About.", &Results { machine: BTreeMap::new(), servers });
        assert!(text.starts_with("\n## The application's requests\n"), "{text}");
        assert!(text.contains("\n### The application's requests: PostgreSQL 15\n"), "{text}");
        assert!(text.contains("\n| healthy, autovacuum off | 4 000 | - | - | - | - | 1.50 | - | - |\n"), "{text}");
        assert!(!text.contains("What was asked"), "{text}");
    }
}
