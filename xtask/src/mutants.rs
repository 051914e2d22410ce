//! `cargo xtask mutants`: breaks the sweep on purpose, one promise at a time, and sees that a test notices.

use anyhow::{Context, ensure};
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;
use support::build::root;
use support::process::output;

/// A change to the code that at least one of the tests must notice.
///
struct Mutant {
    name: &'static str,
    file: &'static str,
    /// What is replaced by what.
    edits: &'static [(&'static str, &'static str)],
    /// Where the tests are, as cargo's arguments: in the library, or on real parts.
    target: &'static [&'static str],
    /// The tests that are run.
    tests: &'static [&'static str],
}

const UNIT: &[&str] = &["--lib"];
const INTEGRATION: &[&str] = &["--test", "it"];

const RECHECK: (&str, &str) = ("WHERE {stale} AND t.{time_started}", "WHERE t.{time_started}");
const LOCK: (&str, &str) = ("format!(\" FOR {} SKIP LOCKED\", start.lock)", "String::new()");
const START: &str = "src/sweep/start.rs";
const STATEMENT: &str = "src/sweep/statement.rs";
const BATCHES: &str = "src/sweep/execute/batches.rs";
const COMMIT: &str = "src/sweep/execute/commit.rs";

const MUTANTS: [Mutant; 10] = [
    Mutant {
        name: "rows updated that are complete meanwhile",
        file: STATEMENT,
        edits: &[RECHECK],
        target: INTEGRATION,
        tests: &["database::sweep::a_row_that_is_completed_in_the_midst"],
    },
    Mutant {
        name: "an optimistic batch kept whatever it completed",
        file: "src/sweep/execute/attempt.rs",
        edits: &[("if batch.is_exact() {", "if batch.updated >= 0 {")],
        target: INTEGRATION,
        tests: &["database::sweep::rows_that_share_a_key", "database::sweep::after_a_rollback"],
    },
    Mutant {
        name: "rows updated that were not selected",
        file: STATEMENT,
        edits: &[("AND t.{time_started} OPERATOR(pg_catalog.<=) {last_time} AND {up_to_last}{locked}", "{locked}")],
        target: INTEGRATION,
        tests: &["database::sweep::takes_the_oldest_first"],
    },
    Mutant {
        name: "a lost COMMIT taken as not done",
        file: COMMIT,
        edits: &[("(self.find_out(start, receipt).await, Err(error))", "(Some(false), Err(error))")],
        target: INTEGRATION,
        tests: &["database::faults::a_lost_answer", "database::faults::a_commit_that_waits"],
    },
    Mutant {
        name: "the end judged by updated rows",
        file: BATCHES,
        edits: &[("if batch.selected < next.rows {", "if batch.completed < next.rows {")],
        target: INTEGRATION,
        tests: &["database::sweep::batches_go_on"],
    },
    Mutant {
        name: "no cursor from batch to batch",
        file: BATCHES,
        edits: &[("cursor = batch.cursor.or(cursor);", "")],
        target: INTEGRATION,
        tests: &["database::sweep::batches_go_on"],
    },
    Mutant {
        name: "the predicate of the plain index stated beside the private one",
        file: START,
        edits: &[("Some(\"t\") { OpenPredicate::Private }", "Some(\"t\") { OpenPredicate::Plain }")],
        target: INTEGRATION,
        tests: &["database::plans::a_batch_walks"],
    },
    Mutant {
        name: "keys compared by the operators of text",
        file: START,
        edits: &[("operators.unwrap_or_else(", "operators.filter(|_: &[String; 2]| false).unwrap_or_else(")],
        target: INTEGRATION,
        tests: &["database::shapes::keys_of_type_citext"],
    },
    Mutant {
        name: "an unknown field of the spec ignored",
        file: "src/api/validate.rs",
        edits: &[("None => faults.push(Fault::Unknown(below(name))),", "None => {}")],
        target: UNIT,
        tests: &["controller::model"],
    },
    Mutant {
        name: "the lock clause alone removed",
        file: STATEMENT,
        edits: &[LOCK],
        target: INTEGRATION,
        tests: &["database::sweep::a_completion_in_flight"],
    },
];

pub fn run() -> anyhow::Result<ExitCode> {
    // Always the same place, where an unchanged file keeps its time, so that cargo takes up what it built the last time.
    let copy = root().join("target/mutants");
    if !copy.join(".git").exists() {
        output(Command::new("git").arg("clone").arg("--quiet").arg(root()).arg(&copy))?;
    }
    let git = |args: &[&str]| output(Command::new("git").arg("-C").arg(&copy).args(args));
    git(&["fetch", "--quiet", "origin", "HEAD"])?;
    git(&["reset", "--quiet", "--hard", "FETCH_HEAD"])?;
    git(&["clean", "--quiet", "-ffdx"])?;
    // Whatever fails without a mutant would notice every one.
    for target in [UNIT, INTEGRATION] {
        let of_target = MUTANTS.iter().filter(|mutant| mutant.target == target);
        let tests: Vec<&str> = of_target.flat_map(|mutant| mutant.tests).copied().collect();
        ensure!(passes(&copy, target, &tests)?, "some of {tests:?} fail without any mutant");
    }
    let mut missed = 0;
    for mutant in &MUTANTS {
        let started = Instant::now();
        let path = copy.join(mutant.file);
        let code = fs::read_to_string(&path)?;
        let mut broken = code.clone();
        for (from, to) in mutant.edits {
            ensure!(broken.contains(from), "{} has changed: fix the mutant {:?}", mutant.file, mutant.name);
            broken = broken.replace(from, to);
        }
        fs::write(&path, &broken)?;
        let noticed = !passes(&copy, mutant.target, mutant.tests)?;
        fs::write(&path, &code)?;
        missed += usize::from(!noticed);
        let verdict = if noticed { "noticed" } else { "MISSED" };
        println!("{verdict:<7} {:>3} s  {}", started.elapsed().as_secs(), mutant.name);
    }
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the tests pass on the copy. A mutant that does not compile is no mutant.
fn passes(copy: &Path, target: &[&str], tests: &[&str]) -> anyhow::Result<bool> {
    let cargo = |rest: &[&str]| {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(copy).env("CARGO_TARGET_DIR", root().join("target"));
        cargo.args(["test", "--locked", "--workspace", "--no-fail-fast"]).args(target).args(rest);
        cargo
    };
    output(&mut cargo(&["--quiet", "--no-run"]))?;
    let run = cargo(&["--"]).args(tests).output().context("cargo cannot be started")?;
    let said = String::from_utf8_lossy(&run.stdout);
    // A name that no test has would pass.
    let ran = said.matches("\ntest ").count();
    ensure!(ran >= tests.len(), "{ran} tests ran for {:?}", tests);
    ensure!(run.status.success() || said.contains(" ... FAILED"), "no test of {:?} came to an end", tests);
    Ok(run.status.success())
}
