//! The binary: parses the command line and hands over to the command.

use std::process::ExitCode;

fn main() -> ExitCode {
    audit_log_sweeper::cli::main(std::env::args_os())
}
