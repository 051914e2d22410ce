//! Tells on stderr what takes long, and for how long already, so that a first run never looks hung.

use std::io::{IsTerminal, Write, stderr};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Does the work under a line that names it and counts the seconds.
pub fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let started = Instant::now();
    let terminal = stderr().is_terminal();
    let (working, finished) = channel::<()>();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            let pause = Duration::from_secs(if terminal { 1 } else { 30 });
            show(terminal, &format!("{what} ..."), false);
            while finished.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                show(terminal, &format!("{what} ... {} s", started.elapsed().as_secs()), false);
            }
        });
        let result = work();
        drop(working);
        result
    });
    let how = if result.is_ok() { "done in" } else { "failed after" };
    show(terminal, &format!("{what}: {how} {:.1} s", started.elapsed().as_secs_f32()), true);
    result
}

/// One line that stays.
pub fn note(text: &str) {
    show(stderr().is_terminal(), text, true);
}

/// Written to the stream itself: the test harness would hold back what `eprintln!` prints.
fn show(terminal: bool, text: &str, stays: bool) {
    let (start, end) = if terminal { ("\r\x1b[K", if stays { "\n" } else { "" }) } else { ("", "\n") };
    // A closed stderr is no reason to stop.
    let _ = write!(stderr(), "{start}{text}{end}");
}
