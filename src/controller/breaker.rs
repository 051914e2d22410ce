//! A circuit breaker for each database server: one that does not answer is asked by one attempt at a time, ever more rarely.
//! All other attempts fail at once, so that they hold nothing while they wait.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::api::Failure;
use crate::api::reason::Stage;

/// The pause after the first failure; it doubles with each further one. A little shorter than that of an object, so that
/// each retry of a server's only object is a probe.
const FIRST_PAUSE: Duration = Duration::from_secs(8);

/// The longest pause between probes.
const LONGEST_PAUSE: Duration = Duration::from_secs(256);

/// A probe without a result is lost after this time.
const PROBE: Duration = Duration::from_mins(2);

/// An open breaker is dropped when nobody has used it for this time.
const FORGET: Duration = Duration::from_mins(30);

/// The breakers of all servers that did not answer.
#[derive(Debug, Default)]
pub struct Breakers(Mutex<HashMap<String, Open>>);

#[derive(Debug)]
struct Open {
    /// In a row.
    failures: u32,
    /// The last one.
    failure: Failure,
    /// When it happened.
    since: Instant,
    /// When the next attempt may ask the server.
    until: Instant,
}

impl Breakers {
    /// Lets an attempt go on unless its server did not answer lately. An urgent one, which a person waits for, does not
    /// wait for the end of a long pause.
    ///
    /// # Errors
    /// The failure of the last attempt that the server did not answer.
    pub fn admit(&self, server: &str, urgent: bool, now: Instant) -> Result<(), Failure> {
        let mut breakers = self.lock();
        let Some(open) = breakers.get_mut(server) else { return Ok(()) };
        let until = if urgent { open.until.min(open.since + FIRST_PAUSE) } else { open.until };
        if now < until {
            let message = format!("not tried, since the server did not answer lately: {}", open.failure.message);
            return Err(Failure { message, ..open.failure.clone() });
        }
        // Half open: this is the probe. The others go on failing until it has ended.
        (open.since, open.until) = (now, now + PROBE);
        Ok(())
    }

    /// Records how an attempt to connect ended that was admitted at `admitted`. `failure`: it failed.
    pub fn record(&self, server: &str, failure: Option<&Failure>, admitted: Instant, now: Instant) {
        let mut breakers = self.lock();
        let failure = match failure {
            Some(failure) if failure.reason.is_silence() => failure,
            // Of the server it tells nothing.
            Some(failure) if failure.reason.stage() == Stage::Object => return,
            _ => {
                breakers.remove(server);
                return;
            }
        };
        breakers.retain(|_, open| now < open.until + FORGET);
        let failures = match breakers.get(server) {
            // It began before the breaker opened: attempts that fail together count once.
            Some(open) if admitted < open.since => return,
            Some(open) => open.failures,
            None => 0,
        };
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures)).min(LONGEST_PAUSE);
        let open = Open { failures: failures + 1, failure: failure.clone(), since: now, until: now + pause };
        breakers.insert(server.to_owned(), open);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Reason;

    fn silence() -> Failure {
        Failure::new(Reason::LoginTimeout, "h did not answer")
    }

    #[test]
    fn an_open_breaker_lets_one_probe_through_after_each_pause_which_doubles() {
        let (breakers, mut now) = (Breakers::default(), Instant::now());
        let admits = |now, urgent| breakers.admit("s", urgent, now).is_ok();
        assert!(admits(now, false) && admits(now, false), "closed");
        for pause in [8, 16, 32, 64, 128, 256, 256] {
            breakers.record("s", Some(&silence()), now, now);
            let failure = breakers.admit("s", false, now + Duration::from_secs(pause - 1)).unwrap_err();
            assert_eq!(failure.reason, Reason::LoginTimeout);
            assert!(failure.message.ends_with(": h did not answer"), "{failure}");
            now += Duration::from_secs(pause);
            assert!(admits(now, false), "the probe, after {pause} s");
            assert!(!admits(now, false) && !admits(now + PROBE / 2, false), "one probe at a time");
        }
        breakers.record("s", None, now, now);
        assert!(admits(now, false) && admits(now, false), "closed again");
        assert!(breakers.lock().is_empty());
    }

    #[test]
    fn an_urgent_attempt_waits_eight_seconds_at_most() {
        let (breakers, now) = (Breakers::default(), Instant::now());
        let after = |seconds| now + Duration::from_secs(seconds);
        for _ in 0..5 {
            breakers.record("s", Some(&silence()), now, now);
        }
        assert!(breakers.admit("s", true, after(7)).is_err() && breakers.admit("s", false, after(8)).is_err());
        assert!(breakers.admit("s", true, after(8)).is_ok());
        assert!(breakers.admit("s", true, after(15)).is_err(), "a probe is under way");
    }

    #[test]
    fn any_answer_closes_it_and_a_lost_probe_does_not_keep_it_open() {
        let (breakers, now) = (Breakers::default(), Instant::now());
        let refused = Failure::new(Reason::AuthenticationFailed, "no");
        breakers.record("s", Some(&refused), now, now);
        assert!(breakers.lock().is_empty(), "a refusal is an answer");
        breakers.record("s", Some(&silence()), now, now);
        assert!(breakers.admit("other", false, now).is_ok(), "each server has its own");
        let probe = now + FIRST_PAUSE;
        assert!(breakers.admit("s", false, probe).is_ok());
        assert!(breakers.admit("s", false, probe + PROBE).is_ok(), "the first probe was cancelled");
        breakers.record("s", Some(&refused), now, now);
        assert!(breakers.lock().is_empty());
    }

    #[test]
    fn attempts_that_fail_together_count_once_and_what_tells_nothing_of_the_server_counts_not() {
        let (breakers, now) = (Breakers::default(), Instant::now());
        let after = |seconds| now + Duration::from_secs(seconds);
        for end in 10..15 {
            breakers.record("s", Some(&silence()), now, after(end));
        }
        assert!(breakers.admit("s", false, after(17)).is_err() && breakers.admit("s", false, after(18)).is_ok());
        breakers.record("s", Some(&Failure::new(Reason::TooManyOpenFiles, "no")), after(18), after(18));
        assert!(breakers.admit("s", false, after(19)).is_err(), "the probe has not ended");
    }

    #[test]
    fn nothing_is_kept_for_ever_of_servers_that_nobody_asks_any_more() {
        let (breakers, now) = (Breakers::default(), Instant::now());
        for server in 0..100 {
            breakers.record(&server.to_string(), Some(&silence()), now, now);
        }
        let later = now + Duration::from_mins(60);
        breakers.record("s", Some(&silence()), later, later);
        assert_eq!(breakers.lock().len(), 1);
    }
}
