//! `cargo xtask`: what developers run beside cargo itself. Parses the command line and hands over to the command.

mod demo;
mod e2e;
mod generate;
mod image;
mod long;
mod mutants;
mod test;

use clap::{Parser, Subcommand};
use image::platform::Platform;
use std::process::ExitCode;

/// Develops audit-log-sweeper.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run all tests on a real API server and PostgreSQL, and see that nothing is left behind
    Test {
        /// Run the database suite alone, on these major versions of PostgreSQL (13 to 18), side by side
        #[arg(long, value_name = "MAJOR", value_delimiter = ',')]
        postgres: Vec<u32>,
        /// Run the database suite alone, with every sweep through PgBouncer in transaction mode; also beside --postgres
        #[arg(long)]
        pgbouncer: bool,
        /// Run it all so often, and stop at the first failure
        #[arg(long, value_name = "TIMES", default_value_t = 1)]
        repeat: u32,
        /// Run all but the database suite on this minor version of Kubernetes: 1.34, the oldest that is supported
        #[arg(long, value_name = "MINOR", conflicts_with_all = ["postgres", "pgbouncer"])]
        kubernetes: Option<String>,
        /// Passed on to `cargo test`
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Write the files that are made from others: the CRD, the chart's README, the manifest to install without Helm, the
    /// screens in docs/using.md
    Generate {
        /// Write nothing; fail if a file is not up to date
        #[arg(long)]
        check: bool,
    },
    /// Build the image, as an OCI archive, and its bill of materials beside it: no daemon is needed
    Image {
        /// What the image is called: NAME:TAG [default: audit-log-sweeper and the version]
        #[arg(long)]
        name: Option<String>,
        /// What it runs on; several, with commas between, make one index [default: this machine's]
        #[arg(long, value_delimiter = ',')]
        platform: Vec<Platform>,
        /// The profile of the build
        #[arg(long, default_value = "release")]
        profile: String,
        /// Build the commit once more, from a clone in another folder, and see the same bytes; start the binary and see it
        /// ready in time
        #[arg(long)]
        check: bool,
    },
    /// Run the image and the chart on real pods, in the cluster of the current kubeconfig
    E2e {
        /// A command that brings an image archive, its last argument, to the nodes: "kind load image-archive"
        #[arg(long, value_name = "COMMAND")]
        load_image: String,
        /// The address of this machine, where its pods reach the database
        #[arg(long, value_name = "ADDRESS")]
        database_host: String,
        /// The profile of the build
        #[arg(long, default_value = "release")]
        profile: String,
    },
    /// Play a history of writers, sweepers and killed backends, and check every promise on it
    History {
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Run two replicas under every fault at once, and check every promise
    Chaos {
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// See that healthy objects are on time beside all kinds of bad neighbours
    Crowd {
        /// How many objects, in hundreds
        #[arg(long, default_value_t = 5)]
        hundreds: u64,
    },
    /// Break the sweep, one promise at a time, and see that a test notices
    Mutants,
    /// Measure the product against what people would use instead
    Bench {
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Watch the operator sweep: installs the chart, fills a table, and checks every sweep
    Demo {
        /// Leave everything running until Ctrl-C, to try more
        #[arg(long)]
        keep: bool,
        /// Build the operator for that platform; in qemu-user, where it is not this machine's
        #[arg(long)]
        platform: Option<Platform>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Test { postgres, pgbouncer, kubernetes, repeat, arguments } => {
            let kubernetes = kubernetes.as_deref();
            test::run(&test::Options { postgres: &postgres, pgbouncer, kubernetes, repeat, arguments: &arguments })
        }
        Task::History { seconds, seed } => long::history(seconds, seed),
        Task::Chaos { seconds, seed } => long::chaos(seconds, seed),
        Task::Crowd { hundreds } => long::crowd(hundreds),
        Task::Image { name, platform, profile, check } => {
            image::run(name.as_deref(), &platform, &profile, check).map(|()| ExitCode::SUCCESS)
        }
        Task::E2e { load_image, database_host, profile } => {
            e2e::run(&load_image, &database_host, &profile).map(|()| ExitCode::SUCCESS)
        }
        Task::Bench { bench } => bench::run(&bench),
        Task::Mutants => mutants::run(),
        Task::Generate { check } => generate::run(check).map(|()| ExitCode::SUCCESS),
        Task::Demo { keep, platform } => demo::run(keep, platform).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
