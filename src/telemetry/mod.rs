//! What the process shows of itself: its logs, whether it lives, and its metrics.

pub mod http;
pub mod metrics;

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How log lines look.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// The least severe lines that are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// From now on a panic is a log line that says where it happened, and not what: that may be data.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        tracing::error!(location, "a panic, which is a bug in the operator");
    }));
}

/// Starts the logs, on standard error. Libraries may say what is wrong, never what they send: they know the passwords.
pub fn start_logs(format: LogFormat, level: LogLevel) {
    use tracing_subscriber::prelude::*;
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let ours = tracing_subscriber::filter::Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        .with_target("audit_log_sweeper", level)
        .with_target("kube_runtime", level.min(LevelFilter::INFO))
        // What they say of a failed request is said by whoever asked: with the object, and without a dump.
        .with_target("kube_client::client::builder", LevelFilter::OFF)
        .with_target("kube_runtime::watcher", LevelFilter::OFF);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_span_events(FmtSpan::NONE);
    let registry = tracing_subscriber::registry().with(ours);
    // A second start, in a test, changes nothing.
    drop(match format {
        LogFormat::Json => registry.with(lines.json().flatten_event(true).with_span_list(false)).try_init(),
        LogFormat::Text => registry.with(lines).try_init(),
    });
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set for the process that panics: this test, started by itself.
    const CHILD: &str = "AUDIT_LOG_SWEEPER_TEST_PANICS";

    #[test]
    fn a_panic_is_logged_with_its_place_and_without_what_it_says() {
        if std::env::var_os(CHILD).is_some() {
            start_logs(LogFormat::Json, LogLevel::Error);
            log_panics();
            panic!("hunter2");
        }
        let name = "telemetry::tests::a_panic_is_logged_with_its_place_and_without_what_it_says";
        let mut itself = Command::new(std::env::current_exe().unwrap());
        let output = itself.args(["--exact", "--nocapture", name]).env(CHILD, "yes").output().unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(said.contains(r#""message":"a panic, which is a bug in the operator""#), "{said}");
        assert!(said.contains(r#""location":"src/telemetry/mod.rs:"#), "{said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
}
