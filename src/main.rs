//! The binary: parses the command line and hands over to the command.

use std::process::ExitCode;

use audit_log_sweeper::cli::Cli;
use clap::Parser;

fn main() -> ExitCode {
    Cli::parse().main()
}
