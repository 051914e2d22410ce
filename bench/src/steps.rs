//! How far long work has come, and how much longer it may take.

use std::time::{Duration, Instant};
use support::progress;

pub struct Steps {
    what: String,
    all: usize,
    done: usize,
    started: Instant,
}

impl Steps {
    pub fn new(what: &str, all: usize) -> Steps {
        Steps { what: what.into(), all, done: 0, started: Instant::now() }
    }

    /// Tells that the next step begins.
    pub fn next(&mut self, step: &str) {
        let left =
            left(self.started.elapsed(), self.done, self.all).map_or_else(String::new, |left| format!("; {left} left"));
        self.done += 1;
        let step = if step.is_empty() { String::new() } else { format!(": {step}") };
        progress::note(&format!("  {} {}/{}{step}{left}", self.what, self.done, self.all));
    }
}

/// How long the rest takes if it goes on like this. None: nothing is known yet.
fn left(elapsed: Duration, done: usize, all: usize) -> Option<String> {
    let each = elapsed.checked_div(u32::try_from(done).ok().filter(|done| *done > 0)?)?;
    let seconds = (each * u32::try_from(all.saturating_sub(done)).ok()?).as_secs();
    Some(if seconds < 90 { format!("about {seconds} s") } else { format!("about {} min", seconds.div_ceil(60)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_as_long_as_what_was_done() {
        let seconds = Duration::from_secs;
        assert_eq!(left(seconds(0), 0, 5), None);
        assert_eq!(left(seconds(20), 2, 5).unwrap(), "about 30 s");
        assert_eq!(left(seconds(100), 1, 3).unwrap(), "about 4 min");
    }
}
